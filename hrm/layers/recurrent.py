"""What mixers have in common that keep a state of each sequence, however long it is."""

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar, Final

from hrm.contract.launches import ATTENTION_LAUNCHES_PER_TASK
from hrm.formats import Format, Formats
from hrm.layers.base import Mixer, Sections, rows_in
from hrm.layers.softmax import FINISHING, PROJECTING
from hrm.layers.work import Kernel, Operator, gemms, linear
from hrm.numeric import Number, minimum

STATE_BYTES: Final = 4  # recurrent states are float32 whatever the dtype


class RecurrentMixer(Mixer):
    """Linear attention or a state-space layer: a token changes a state of one size, and reads it.

    Before that a part of what is projected goes through a causal convolution over the last
    `conv_kernel` tokens, of which a sequence keeps one less. What gates the output stays where it
    was projected. Prefill computes blocks of `chunk_tokens` as products of matrices.
    """

    conv_kernel: int
    chunk_tokens: ClassVar[int]

    @cached_property
    def projected_size(self) -> int:
        """Elements that a token is projected to."""
        return rows_in(self.projected)

    @cached_property
    def convolved_elements(self) -> int:
        """Those of them that go through the convolution."""
        return rows_in(self.convolved)

    @property
    def held_elements(self) -> int:
        """The output's gate, which is as wide as what it scales."""
        return self.returned_elements

    @property
    @abstractmethod
    def state_elements(self) -> int:
        """Elements of a sequence's recurrent state."""

    @property
    @abstractmethod
    def flops_per_state_element(self) -> int:
        """FLOPs of a new token for each element of the state."""

    @abstractmethod
    def block_flops(self, block: Number) -> Number:
        """FLOPs of a token in prefill, in blocks of so many."""

    @property
    def projection_parameters(self) -> int:
        """Parameters of the projections."""
        return self.hidden_size * self.projected_size

    @property
    def selection_parameters(self) -> int:
        """Parameters of matrices between the convolution and the recurrence."""
        return 0

    @property
    def cached_elements(self) -> int:
        """None: nothing is kept of each token."""
        return 0

    def state_bytes(self, formats: Formats) -> int:
        """The recurrent state, and the tokens that the convolution still needs: whole float32 numbers."""
        convolution = formats.compute.bytes_of(self.convolved_elements, self.conv_kernel - 1)
        return STATE_BYTES * (self.state_elements + -(-convolution // STATE_BYTES))

    @property
    def sent_elements(self) -> int:
        """All that is projected but the output's gate."""
        return self.projected_size - self.held_elements

    @property
    def kept_rows(self) -> int:
        """One: the state."""
        return 1

    def project(self, formats: Formats, tokens: Number) -> Operator:
        """Norm and projections of so many tokens."""
        touched = self.hidden_size + self.projected_size
        return Operator((gemms(tokens, self.projection_parameters, touched, formats),)) + PROJECTING

    def attend(self, formats: Formats, requests: Number, context: Number) -> Operator:
        """One step of every request, whose state is read and written: no context makes it longer."""
        flops = self.flops_per_state_element * self.state_elements + self._convolution_flops
        num_bytes = 2 * self.state_bytes(formats) + 0 * context
        kernel = Kernel(requests * flops, requests * num_bytes, requests, reads_kv=True)
        return Operator((*self._selected(formats, requests), kernel), ATTENTION_LAUNCHES_PER_TASK, requests)

    def prefill(self, formats: Formats, tokens: Number, prompt_len: Number) -> Operator:
        """All up to the output over a chunk; every block reads and writes the state."""
        before = self.project(formats, tokens)
        block = minimum(prompt_len, self.chunk_tokens)
        flops = self.block_flops(block) + self._convolution_flops
        touched = formats.compute.bytes_of(2 * self.convolved_elements + self.returned_elements)
        state = 2 * STATE_BYTES * self.state_elements / block
        part = minimum(prompt_len, tokens)
        kernel = Kernel(tokens * flops, tokens * (touched + state), part)
        kernels = (*before.kernels, *self._selected(formats, tokens), kernel)
        return Operator(kernels, before.launches, tokens / part, before.unfused_launches)

    def finish(self, formats: Formats, tokens: Number) -> Operator:
        """The gated norm and the output projection, with the norm after it."""
        return Operator((linear(tokens, self.returned_elements, self.hidden_size, formats),)) + FINISHING

    @property
    def _convolution_flops(self) -> int:
        return 2 * self.conv_kernel * self.convolved_elements

    def _selected(self, formats: Formats, tokens: Number) -> tuple[Kernel, ...]:
        parameters = self.selection_parameters
        return (gemms(tokens, parameters, 2 * self.convolved_elements, formats),) if parameters else ()

    @property
    def kept_elements(self) -> int:
        """All that is projected, and the output."""
        return self.projected_size + self.returned_elements

    @property
    @abstractmethod
    def float32_elements(self) -> int:
        """Elements of a token that prefill has in float32 for a while."""

    def temporary_bytes(self, compute: Format) -> int:
        """What prefill has in float32, or a second output."""
        return max(STATE_BYTES * self.float32_elements, compute.bytes_of(self.returned_elements))

    def prefix_bytes(self, formats: Formats) -> int:  # noqa: ARG002 - others need it
        """None: what earlier parts leave is the state."""
        return 0

    @property
    def prefix_in_cache(self) -> bool:
        """The state is what the next part begins with."""
        return True

    def obstacle_to(self, ranks: int) -> str:
        """Heads are divided, each with its part of the state."""
        heads = self.state_heads
        return f"its {heads} heads of linear attention cannot be divided by {ranks}" if heads % ranks else ""

    @property
    @abstractmethod
    def state_heads(self) -> int:
        """Parts of the state that GPUs in tensor parallel can divide among them."""

    @property
    @abstractmethod
    def convolved(self) -> Sections:
        """What is convolved, one after the other."""

    @property
    @abstractmethod
    def projected(self) -> Sections:
        """What one matrix projects to, one after the other."""

    @property
    def sections(self) -> Mapping[str, Sections]:
        """Of what is projected and of what is convolved, with their biases."""
        projected, convolved = self.projected, self.convolved
        return {
            "projections": projected,
            "projections_bias": projected,
            "convolution": convolved,
            "convolution_bias": convolved,
        }
