"""Whether a request can be run at all."""

from executor.batching import Request
from executor.errors import JobError
from executor.model import Architecture
from hrm.policy import Policy


def check_request(request: Request, arch: Architecture, policy: Policy) -> None:
    """Raise JobError if the request could never be run under the policy, whatever is beside it."""
    length, new = len(request.prompt), request.params.max_tokens
    longest = policy.max_prompt_tokens(arch.spec)
    rules = (
        (length >= 1, "<empty>", "must have at least one token", "give a prompt"),
        (
            length <= longest,
            f"<{length} tokens>",
            f"must have at most the {longest} tokens that the policy prefills",
            "shorten it or solve a policy with a greater --max-prompt-len",
        ),
        (
            request.kv_tokens <= policy.kv_tokens_per_micro_batch,
            f"<{length} tokens, {new} to generate>",
            f"must fit the policy's micro-batch cache of {policy.kv_tokens_per_micro_batch} tokens",
            "lower max_tokens, or solve a policy with greater --max-prompt-len or --gen-len",
        ),
        (
            length + new <= arch.max_position_embeddings,
            f"<{length} tokens, {new} to generate>",
            f"must stay within the model's {arch.max_position_embeddings} positions{arch.why_no_longer}",
            "shorten the prompt or lower max_tokens",
        ),
        (
            length == 0 or 0 <= min(request.prompt) <= max(request.prompt) < arch.vocab_size,
            f"<token ids up to {max(request.prompt, default=0)}>",
            f"must hold token ids from 0 to {arch.vocab_size - 1}",
            "tokenise it with this model's tokenizer",
        ),
    )
    for holds, value, rule, remedy in rules:
        if not holds:
            raise JobError(f"{request.name}: prompt", value, rule, remedy)
