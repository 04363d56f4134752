"""How long an answer may be whose request does not say."""

from dataclasses import dataclass

from hrm.contract.rows import KV_BLOCK_TOKENS
from hrm.policy import Policy


@dataclass(frozen=True, slots=True)
class AnswerRoom:
    """How many tokens a chat answer may have that is asked for without a `max_tokens`.

    What its share of a micro-batch's cache leaves beside the prompt, so that as many requests run
    together as the policy was solved for; at least the `gen_len` tokens that it was solved for,
    where they fit at all.
    """

    share_tokens: int
    gen_len: int
    most_tokens: int

    @staticmethod
    def of(policy: Policy, gen_len: int, positions: int) -> "AnswerRoom":
        """The room under a policy, for a model of so many positions."""
        blocks = policy.kv_tokens_per_micro_batch // KV_BLOCK_TOKENS
        share = blocks // policy.micro_batch_size * KV_BLOCK_TOKENS
        return AnswerRoom(share, gen_len, min(blocks * KV_BLOCK_TOKENS, positions))

    def max_tokens(self, num_prompt_tokens: int) -> int:
        """Tokens that an answer to a prompt of so many may have."""
        wanted = max(self.share_tokens - num_prompt_tokens, self.gen_len)
        return max(min(wanted, self.most_tokens - num_prompt_tokens), 1)

    @property
    def notice(self) -> str:
        """Says what holds for requests without `max_tokens`."""
        return (
            "chat requests without max_tokens: an answer may have what a request's share of the"
            f" policy's cache leaves, {self.share_tokens} tokens less the prompt's (at least"
            f" {self.gen_len}); give max_tokens, or solve the policy with another --gen-len"
        )
