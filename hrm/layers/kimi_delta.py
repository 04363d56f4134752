"""Kimi delta attention: a gated delta rule whose decay every element of a key has for itself."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, final

from hrm.layers.base import Section, Sections, TensorSpec, Unit, Vectors, check_vectors, vector_tensors
from hrm.layers.recurrent import RecurrentMixer
from hrm.numeric import Number


@final
@dataclass(frozen=True, kw_only=True)
class KimiDelta(RecurrentMixer):
    """KDA (arXiv 2510.26692): a state of `head_dim` × `head_dim` in each head.

    Decays and the output's gate are projected through `decay_rank` and `gate_rank` elements, or
    directly if these are 0.
    """

    chunk_tokens: ClassVar[int] = 64
    hidden_size: int
    num_heads: int
    head_dim: int
    decay_rank: int = 0
    gate_rank: int = 0
    conv_kernel: int = 4
    vectors: Vectors = ()
    block: Literal["kimi_delta"] = "kimi_delta"

    def __post_init__(self) -> None:
        """Reject impossible dimensions (ModelError)."""
        self.check_sizes("hidden_size", "num_heads", "head_dim", "conv_kernel")
        self.check_sizes("decay_rank", "gate_rank", at_least=0)
        check_vectors("vectors", self.vectors)

    @property
    def words(self) -> str:
        """What it is, for people."""
        return f"Kimi delta: {self.num_heads} heads of {self.head_dim}, convolution over {self.conv_kernel}"

    @property
    def returned_elements(self) -> int:
        """A value of every head."""
        return self.num_heads * self.head_dim

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Norms, projections, the convolution, decays and the output."""
        heads, hidden, size = self.num_heads, self.hidden_size, self.returned_elements
        return (
            TensorSpec("attention_norm", (hidden,), Unit.MIXER),
            TensorSpec("qkv", (3 * size, hidden), Unit.MIXER, 0, (size, size, size)),
            TensorSpec("step", (heads, hidden), Unit.MIXER, 0),
            *self._through("decay", self.decay_rank),
            *self._through("gate", self.gate_rank),
            TensorSpec("convolution", (self.convolved_elements, self.conv_kernel), Unit.MIXER, 0),
            TensorSpec("decay_bias", (size,), Unit.MIXER, 0),
            TensorSpec("decay_scale", (heads,), Unit.MIXER, 0),
            TensorSpec("output_norm", (self.head_dim,), Unit.MIXER),
            TensorSpec("output", (hidden, size), Unit.MIXER, 1),
            *vector_tensors(self.vectors, Unit.MIXER),
        )

    def _through(self, name: str, rank: int) -> tuple[TensorSpec, ...]:
        size, hidden = self.returned_elements, self.hidden_size
        if not rank:
            return (TensorSpec(name, (size, hidden), Unit.MIXER, 0),)
        down = TensorSpec(f"{name}_down", (rank, hidden), Unit.MIXER)
        return down, TensorSpec(f"{name}_up", (size, rank), Unit.MIXER, 0)

    @property
    def projection_parameters(self) -> int:
        """Parameters of all matrices before the recurrence."""
        matrices = (tensor for tensor in self.tensors if len(tensor.shape) == 2)
        return sum(tensor.parameters for tensor in matrices if tensor.name not in {"convolution", "output"})

    @cached_property
    def projected_size(self) -> int:
        """Queries, keys, values, decays, the output's gate, and a step of every head."""
        return 5 * self.returned_elements + self.num_heads

    @property
    def state_elements(self) -> int:
        """A matrix of keys × values in every head."""
        return self.returned_elements * self.head_dim

    @property
    def flops_per_state_element(self) -> int:
        """Decaying takes 1, and reading for the key, adding and reading for the query take 2 each."""
        return 7

    def block_flops(self, block: Number) -> Number:
        """As the gated delta rule takes, with keys as wide as values."""
        return 2 * self.returned_elements * (5 * block + 3 * self.head_dim)

    @property
    def host_tensors(self) -> tuple[str, ...]:
        """The convolution with decays and their biases."""
        return "convolution", "decay_bias", "decay_scale"

    @property
    def state_heads(self) -> int:
        """Heads, each with its state."""
        return self.num_heads

    def shares(self, ranks: int, whole: int) -> dict[str, int]:  # noqa: ARG002 - others need it
        """Heads."""
        return {"num_heads": self.num_heads // ranks}

    @property
    def convolved(self) -> Sections:
        """Queries, keys and values."""
        return 3 * (Section(self.num_heads, self.head_dim),)

    @property
    def projected(self) -> Sections:
        """Nothing: several matrices project."""
        return ()

    @property
    def float32_elements(self) -> int:
        """Queries, keys, values, decays and outputs, and a block's products in every head."""
        return 5 * self.returned_elements + 2 * self.num_heads * self.chunk_tokens
