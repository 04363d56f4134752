"""How long an answer may be whose request does not say."""

from dataclasses import dataclass

from executor.model import Architecture
from hrm.contract.rows import KV_BLOCK_TOKENS
from hrm.policy import Policy


@dataclass(frozen=True, slots=True)
class AnswerRoom:
    """How many tokens a chat answer may have that is asked for without a `max_tokens`.

    What its share of a micro-batch's cache leaves beside the prompt, so that as many requests run
    together as the policy was solved for; at least the `gen_len` tokens that it was solved for,
    where they fit at all. Where texts of more than `short_tokens` are rotated otherwise, and these fit
    within that, the answer ends there.
    """

    share_tokens: int
    gen_len: int
    most_tokens: int
    short_tokens: int = 0

    @staticmethod
    def of(policy: Policy, gen_len: int, arch: Architecture) -> "AnswerRoom":
        """The room that a model's answers have under a policy."""
        blocks = policy.kv_tokens_per_micro_batch // KV_BLOCK_TOKENS
        share = blocks // policy.micro_batch_size * KV_BLOCK_TOKENS
        most = min(blocks * KV_BLOCK_TOKENS, arch.max_position_embeddings)
        return AnswerRoom(share, gen_len, most, arch.first_positions if arch.long_layers else 0)

    def max_tokens(self, num_prompt_tokens: int) -> int:
        """Tokens that an answer to a prompt of so many may have."""
        wanted = max(self.share_tokens - num_prompt_tokens, self.gen_len)
        stays_short = num_prompt_tokens + self.gen_len <= self.short_tokens
        most = min(self.most_tokens, self.short_tokens) if stays_short else self.most_tokens
        return max(min(wanted, most - num_prompt_tokens), 1)

    @property
    def notice(self) -> str:
        """Says what holds for requests without `max_tokens`."""
        return (
            "chat requests without max_tokens: an answer may have what a request's share of the"
            f" policy's cache leaves, {self.share_tokens} tokens less the prompt's (at least"
            f" {self.gen_len}); give max_tokens, or solve the policy with another --gen-len"
        )
