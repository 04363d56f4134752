"""Gated delta rule: linear attention that keeps a matrix of each sequence, however long it is."""

from dataclasses import dataclass
from typing import Final, Literal, final

from hrm.contract.launches import ATTENTION_LAUNCHES_PER_TASK
from hrm.formats import Format, Formats
from hrm.layers.base import Mixer, TensorSpec, Unit, Vectors, check_vectors, vector_tensors
from hrm.layers.softmax import FINISHING, PROJECTING
from hrm.layers.work import Kernel, Operator, gemms, linear
from hrm.numeric import Number, minimum

STATE_BYTES: Final = 4  # the recurrent state is float32 whatever the dtype
BLOCK_TOKENS: Final = 64  # that prefill computes at once, as products of matrices


@final
@dataclass(frozen=True, kw_only=True)
class GatedDeltaNet(Mixer):
    """A recurrent state of keys × values in each value head (arXiv 2412.06464), as in Qwen3-Next.

    Queries, keys and values go through a causal convolution over the last `conv_kernel` tokens, of
    which a sequence keeps one less than that. A step decays the state, reads what it holds for the
    key, adds the difference to the value, and reads it for the query. A gate as wide as the values
    scales the normed output.
    """

    hidden_size: int
    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel: int = 4
    vectors: Vectors = ()
    block: Literal["gated_delta_net"] = "gated_delta_net"

    def __post_init__(self) -> None:
        """Reject impossible dimensions (ModelError)."""
        self.check_sizes("hidden_size", "num_key_heads", "num_value_heads")
        self.check_sizes("key_head_dim", "value_head_dim", "conv_kernel")
        self.require(
            self.num_value_heads % self.num_key_heads == 0,
            "num_value_heads",
            f"must be a multiple of num_key_heads {self.num_key_heads}",
        )
        check_vectors("vectors", self.vectors)

    @property
    def words(self) -> str:
        """What it is, for people."""
        values = f"{self.num_value_heads} heads of {self.value_head_dim}"
        keys = f"{self.num_key_heads} of {self.key_head_dim}"
        return f"gated delta: values in {values} on keys in {keys}, convolution over {self.conv_kernel}"

    @property
    def convolved_elements(self) -> int:
        """Queries, keys and values of a token."""
        return 2 * self.num_key_heads * self.key_head_dim + self.returned_elements

    @property
    def returned_elements(self) -> int:
        """A value of every value head."""
        return self.num_value_heads * self.value_head_dim

    @property
    def projected_size(self) -> int:
        """Queries, keys, values, the output's gate, and decay and step of every value head."""
        return sum(self.projected_parts)

    @property
    def projected_parts(self) -> tuple[int, int, int, int]:
        """Elements of what is convolved, the gate, decays and steps."""
        return self.convolved_elements, self.returned_elements, self.num_value_heads, self.num_value_heads

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Norms, one matrix to all that is projected, the convolution, decays and the output."""
        heads, hidden, parts = self.num_value_heads, self.hidden_size, self.projected_parts
        return (
            TensorSpec("attention_norm", (hidden,), Unit.MIXER),
            TensorSpec("projections", (sum(parts), hidden), Unit.MIXER, 0, parts),
            TensorSpec("convolution", (self.convolved_elements, self.conv_kernel), Unit.MIXER, 0),
            TensorSpec("decay", (heads,), Unit.MIXER, 0),
            TensorSpec("step_bias", (heads,), Unit.MIXER, 0),
            TensorSpec("output_norm", (self.value_head_dim,), Unit.MIXER),
            TensorSpec("output", (hidden, self.returned_elements), Unit.MIXER, 1),
            *vector_tensors(self.vectors, Unit.MIXER),
        )

    @property
    def cached_elements(self) -> int:
        """None: nothing is kept of each token."""
        return 0

    @property
    def state_elements(self) -> int:
        """Elements of a sequence's recurrent state."""
        return self.returned_elements * self.key_head_dim

    def state_bytes(self, formats: Formats) -> int:
        """The recurrent state, and the tokens that the convolution still needs: whole float32 numbers."""
        convolution = formats.kv_cache.bytes_of(self.convolved_elements, self.conv_kernel - 1)
        return STATE_BYTES * (self.state_elements + -(-convolution // STATE_BYTES))

    @property
    def sent_elements(self) -> int:
        """All that is projected but the output's gate."""
        return self.projected_size - self.held_elements

    @property
    def held_elements(self) -> int:
        """The output's gate."""
        return self.returned_elements

    def sent_bytes(self, formats: Formats) -> int:
        """All that is projected but the output's gate."""
        return formats.compute.bytes_of(self.sent_elements)

    @property
    def host_tensors(self) -> tuple[str, ...]:
        """The convolution with decays and their biases."""
        return "convolution", "decay", "step_bias"

    @property
    def kept_rows(self) -> int:
        """One: the state."""
        return 1

    @property
    def cache_heads(self) -> int:
        """Key heads, each with its value heads."""
        return self.num_key_heads

    def project(self, formats: Formats, tokens: Number) -> Operator:
        """Norm and projections of so many tokens."""
        parameters = self.hidden_size * self.projected_size
        touched = self.hidden_size + self.projected_size
        return Operator((gemms(tokens, parameters, touched, formats),)) + PROJECTING

    def attend(self, formats: Formats, requests: Number, context: Number) -> Operator:
        """One step of every request, whose state is read and written: no context makes it longer.

        Decaying takes 1 FLOP for each element of the state, and reading for the key, adding and
        reading for the query take 2 each.
        """
        flops = 7 * self.state_elements + 2 * self.conv_kernel * self.convolved_elements
        num_bytes = 2 * self.state_bytes(formats) + 0 * context
        kernel = Kernel(requests * flops, requests * num_bytes, requests, reads_kv=True)
        return Operator((kernel,), ATTENTION_LAUNCHES_PER_TASK, requests)

    def prefill(self, formats: Formats, tokens: Number, prompt_len: Number) -> Operator:
        """All up to the output over a chunk, in blocks of BLOCK_TOKENS (arXiv 2412.06464, §3.3).

        For each token of a block, products with the others take 2 FLOPs an element: keys with keys,
        queries with keys, and both sides of the triangular system with keys, values and values
        again; and three with the state. Every block reads and writes the state.
        """
        before = self.project(formats, tokens)
        heads, key, value = self.num_value_heads, self.key_head_dim, self.value_head_dim
        block = minimum(prompt_len, BLOCK_TOKENS)
        flops = 2 * heads * (block * (3 * key + 2 * value) + 3 * key * value)
        convolution = 2 * self.conv_kernel * self.convolved_elements
        touched = formats.compute.bytes_of(2 * self.convolved_elements + self.returned_elements)
        state = 2 * STATE_BYTES * self.state_elements / block
        part = minimum(prompt_len, tokens)
        kernel = Kernel(tokens * (flops + convolution), tokens * (touched + state), part)
        return Operator((*before.kernels, kernel), before.launches, tokens / part, before.unfused_launches)

    def finish(self, formats: Formats, tokens: Number) -> Operator:
        """The gated norm and the output projection, with the norm after it."""
        return Operator((linear(tokens, self.returned_elements, self.hidden_size, formats),)) + FINISHING

    @property
    def kept_elements(self) -> int:
        """All that is projected, and the output."""
        return self.projected_size + self.returned_elements

    def temporary_bytes(self, compute: Format) -> int:
        """The output's float32 copy for its norm, or a second output."""
        copy = STATE_BYTES * (self.returned_elements + self.num_value_heads)
        return max(copy, compute.bytes_of(self.returned_elements))

    @property
    def block_bytes(self) -> int:
        """In float32: what is convolved, before and after; and of every value head the rest.

        That is queries, keys, values, what the state held for them and the outputs, three products of
        all tokens, decays and steps, and a copy for the solver of triangular systems.
        """
        convolved = 2 * (BLOCK_TOKENS + self.conv_kernel) * self.convolved_elements
        of_token = 2 * self.key_head_dim + 4 * self.value_head_dim + 4 * BLOCK_TOKENS + 16
        return STATE_BYTES * (convolved + self.num_value_heads * BLOCK_TOKENS * of_token)

    def prefix_bytes(self, formats: Formats, ranks: int) -> int:  # noqa: ARG002 - others need it
        """None: what earlier parts leave is the state."""
        return 0

    @property
    def prefix_in_cache(self) -> bool:
        """The state is what the next part begins with."""
        return True

    def obstacle_to(self, ranks: int) -> str:
        """Key heads are divided, with their value heads."""
        heads = self.num_key_heads
        return f"its {heads} heads of linear attention cannot be divided by {ranks}" if heads % ranks else ""
