"""Gated delta rule: linear attention that keeps a matrix of each sequence, however long it is."""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from hrm.layers.base import Section, Sections, TensorSpec, Unit, Vectors, check_vectors, vector_tensors
from hrm.layers.recurrent import STATE_BYTES, RecurrentMixer
from hrm.numeric import Number


@final
@dataclass(frozen=True, kw_only=True)
class GatedDeltaNet(RecurrentMixer):
    """A recurrent state of keys × values in each value head (arXiv 2412.06464), as in Qwen3-Next.

    Queries, keys and values go through the convolution. A step decays the state, reads what it holds
    for the key, adds the difference to the value, and reads it for the query. A gate as wide as the
    values scales the normed output.
    """

    chunk_tokens: ClassVar[int] = 64

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
    def returned_elements(self) -> int:
        """A value of every value head."""
        return self.num_value_heads * self.value_head_dim

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Norms, one matrix to all that is projected, the convolution, decays and the output."""
        heads, hidden = self.num_value_heads, self.hidden_size
        parts = (self.convolved_elements, self.returned_elements, heads, heads)
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
    def state_elements(self) -> int:
        """A matrix of keys × values in every value head."""
        return self.returned_elements * self.key_head_dim

    @property
    def flops_per_state_element(self) -> int:
        """Decaying takes 1, and reading for the key, adding and reading for the query take 2 each."""
        return 7

    def block_flops(self, block: Number) -> Number:
        """As products of matrices (arXiv 2412.06464, §3.3).

        For each token of a block, products with the others take 2 FLOPs an element: keys with keys,
        queries with keys, and both sides of the triangular system with keys, values and values
        again; and three with the state.
        """
        heads, key, value = self.num_value_heads, self.key_head_dim, self.value_head_dim
        return 2 * heads * (block * (3 * key + 2 * value) + 3 * key * value)

    @property
    def host_tensors(self) -> tuple[str, ...]:
        """The convolution with decays and their biases."""
        return "convolution", "decay", "step_bias"

    @property
    def state_heads(self) -> int:
        """Key heads, each with its value heads."""
        return self.num_key_heads

    def shares(self, ranks: int, whole: int) -> dict[str, int]:  # noqa: ARG002 - others need it
        """Heads."""
        return {"num_key_heads": self.num_key_heads // ranks, "num_value_heads": self.num_value_heads // ranks}

    @property
    def convolved(self) -> Sections:
        """Queries and keys of all key heads, and values of all value heads."""
        keys = Section(self.num_key_heads, self.key_head_dim)
        return keys, keys, Section(self.num_value_heads, self.value_head_dim)

    @property
    def projected(self) -> Sections:
        """These, the gate, and decay and step of every value head."""
        heads = Section(self.num_value_heads)
        return (*self.convolved, Section(self.num_value_heads, self.value_head_dim), heads, heads)

    @property
    def float32_elements(self) -> int:
        """A copy of the output, for its norm; the rest is of one block at a time."""
        return self.returned_elements + self.num_value_heads

    @property
    def block_bytes(self) -> int:
        """In float32: what is convolved, before and after; and of every value head the rest.

        That is queries, keys, values, what the state held for them and the outputs, three products of
        all tokens, decays and steps, and a copy for the solver of triangular systems.
        """
        convolved = 2 * (self.chunk_tokens + self.conv_kernel) * self.convolved_elements
        of_token = 2 * self.key_head_dim + 4 * self.value_head_dim + 4 * self.chunk_tokens + 16
        return STATE_BYTES * (convolved + self.num_value_heads * self.chunk_tokens * of_token)
