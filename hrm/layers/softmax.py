"""What kinds of softmax attention have in common: a cache that grows with every token."""

from abc import abstractmethod

from hrm.contract.launches import (
    ATTENTION_LAUNCHES_PER_TASK,
    FUSED_POST_ATTENTION_LAUNCHES,
    FUSED_PRE_ATTENTION_LAUNCHES,
    POST_ATTENTION_LAUNCHES,
    PRE_ATTENTION_LAUNCHES,
)
from hrm.formats import Formats
from hrm.layers.base import Mixer
from hrm.layers.work import Kernel, Operator, gemms, linear
from hrm.numeric import Number, minimum

FINISHING = Operator(
    launches=FUSED_POST_ATTENTION_LAUNCHES, unfused_launches=POST_ATTENTION_LAUNCHES - FUSED_POST_ATTENTION_LAUNCHES
)
PROJECTING = Operator(
    launches=FUSED_PRE_ATTENTION_LAUNCHES, unfused_launches=PRE_ATTENTION_LAUNCHES - FUSED_PRE_ATTENTION_LAUNCHES
)


class SoftmaxAttention(Mixer):
    """Attention of queries to keys, whose work follows from a few sizes."""

    @property
    @abstractmethod
    def query_size(self) -> int:
        """Elements of one token's queries: heads × head_dim."""

    @property
    @abstractmethod
    def projection_parameters(self) -> int:
        """Parameters of the projections to queries and to what is cached, with norms between."""

    @property
    @abstractmethod
    def flops_per_context_token(self) -> int:
        """FLOPs of one new token's decode attention over one cached token."""

    @property
    def output_parameters(self) -> int:
        """Parameters of the output projection."""
        return self.returned_elements * self.hidden_size

    @property
    def up_parameters(self) -> int:
        """Parameters between what is cached and the keys and values of the heads."""
        return 0

    @property
    def attended_parts(self) -> tuple[int, ...]:
        """The parts that attention reads of a cached token that it sees."""
        return self.cached_parts

    def seen(self, context: Number) -> Number:
        """Tokens that attention sees of those that it reaches."""
        return self.reach(context)

    def mean_seen(self, prompt_len: Number) -> Number:
        """The same as a mean over the tokens of a prompt."""
        capped = self.seen(prompt_len)
        return capped - capped * capped / (2 * prompt_len)

    def choose(self, formats: Formats, tokens: Number, context: Number) -> tuple[Kernel, ...]:  # noqa: ARG002
        """What finds out, for each of so many tokens, which ones of its context attention sees."""
        return ()

    @abstractmethod
    def prefix_read_bytes(self, formats: Formats) -> int:
        """Bytes that a later part of a split prompt reads of each earlier token."""

    def prefix_bytes(self, formats: Formats) -> int:
        """What later parts read."""
        return self.prefix_read_bytes(formats)

    def state_bytes(self, formats: Formats) -> int:  # noqa: ARG002 - others need it
        """None: all that is cached is of tokens."""
        return 0

    @property
    def sent_elements(self) -> int:
        """Queries, and what is cached."""
        return self.query_size + self.cached_elements

    def sent_bytes(self, formats: Formats) -> int:
        """Queries, and what is cached."""
        return formats.compute.bytes_of(self.query_size) + self.cached_bytes(formats)

    def project(self, formats: Formats, tokens: Number) -> Operator:
        """Norm, projections and rotary embedding of so many tokens."""
        touched = self.hidden_size + self.query_size + self.cached_elements
        return Operator((gemms(tokens, self.projection_parameters, touched, formats),)) + PROJECTING

    def attend(self, formats: Formats, requests: Number, context: Number) -> Operator:
        """Queries against keys and weights against values, the cache read once.

        What projects a cached vector up is applied to queries and outputs instead.
        """
        seen = self.seen(context)
        kernel = Kernel(
            requests * seen * self.flops_per_context_token,
            requests * seen * formats.kv_cache.row_bytes(self.attended_parts),
            requests,
            reads_kv=True,
        )
        touched = self.query_size + self.returned_elements
        kernels = (*self._projected_up(formats, requests, touched), *self.choose(formats, requests, context), kernel)
        return Operator(kernels, ATTENTION_LAUNCHES_PER_TASK, requests)

    def prefill(self, formats: Formats, tokens: Number, prompt_len: Number) -> Operator:
        """All up to causal attention over a chunk.

        Over all parts of a split prompt, attention is what it is over the whole, but for keys and
        values of earlier parts, which each later part reads again.
        """
        before = self.project(formats, tokens)
        mean_context = self.mean_seen(prompt_len)
        expanded = self.query_size + self.returned_elements
        part = minimum(prompt_len, tokens)
        prefix = self.seen((prompt_len - part) / 2)  # as a mean over the parts
        read = formats.compute.bytes_of(expanded + self.cached_elements)
        attention = Kernel(
            2 * tokens * mean_context * expanded,
            tokens * (read + prefix / part * self.prefix_read_bytes(formats)),
            part,
        )
        up = self._projected_up(formats, tokens, self.cached_elements + expanded)
        kernels = (*up, *before.kernels, *self.choose(formats, tokens, prompt_len / 2), attention)
        return Operator(kernels, before.launches, tokens / part, before.unfused_launches)

    def finish(self, formats: Formats, tokens: Number) -> Operator:
        """The output projection, with the norm after it."""
        return Operator((linear(tokens, self.returned_elements, self.hidden_size, formats),)) + FINISHING

    def _projected_up(self, formats: Formats, tokens: Number, touched: int) -> tuple[Kernel, ...]:
        up = self.up_parameters
        return (gemms(tokens, up, touched, formats),) if up else ()
