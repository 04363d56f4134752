"""State-space layers: Mamba and Mamba-2."""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from hrm.layers.base import Section, Sections, TensorSpec, Unit, Vectors, check_vectors, vector_tensors
from hrm.layers.recurrent import RecurrentMixer
from hrm.numeric import Number


@final
@dataclass(frozen=True, kw_only=True)
class Mamba(RecurrentMixer):
    """A selective state space (arXiv 2312.00752), as in Jamba: `state_size` numbers of each inner unit.

    What decays, enters and is read of a state follows from the convolved units, by projections
    through `step_rank` elements and to the state's size. A gate as wide scales the output.
    """

    chunk_tokens: ClassVar[int] = 2048  # that a scan has at once
    hidden_size: int
    inner_size: int
    state_size: int
    step_rank: int
    conv_kernel: int = 4
    vectors: Vectors = ()
    block: Literal["mamba"] = "mamba"

    def __post_init__(self) -> None:
        """Reject impossible dimensions (ModelError)."""
        self.check_sizes("hidden_size", "inner_size", "state_size", "step_rank", "conv_kernel")
        check_vectors("vectors", self.vectors)

    @property
    def words(self) -> str:
        """What it is, for people."""
        return f"Mamba: {self.inner_size} units with a state of {self.state_size}, convolution over {self.conv_kernel}"

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Norm, units and their gate, the convolution, what selects, and the output."""
        inner, state, hidden = self.inner_size, self.state_size, self.hidden_size
        return (
            TensorSpec("attention_norm", (hidden,), Unit.MIXER),
            TensorSpec("projections", (2 * inner, hidden), Unit.MIXER, 0, (inner, inner)),
            TensorSpec("convolution", (inner, self.conv_kernel), Unit.MIXER, 0),
            TensorSpec("selection", (self.step_rank + 2 * state, inner), Unit.MIXER, 1, (self.step_rank, state, state)),
            TensorSpec("step", (inner, self.step_rank), Unit.MIXER, 0),
            TensorSpec("step_bias", (inner,), Unit.MIXER, 0),
            TensorSpec("decay", (inner, state), Unit.MIXER, 0),
            TensorSpec("skip", (inner,), Unit.MIXER, 0),
            TensorSpec("output", (hidden, inner), Unit.MIXER, 1),
            *vector_tensors(self.vectors, Unit.MIXER),
        )

    @property
    def returned_elements(self) -> int:
        """The units."""
        return self.inner_size

    @property
    def state_elements(self) -> int:
        """Of every unit its own."""
        return self.inner_size * self.state_size

    @property
    def selection_parameters(self) -> int:
        """The projections that follow the convolution."""
        return self.inner_size * (2 * self.step_rank + 2 * self.state_size)

    @property
    def flops_per_state_element(self) -> int:
        """The decay of the step takes 2, decaying 1, what enters 3 and reading 2."""
        return 8

    def block_flops(self, block: Number) -> Number:
        """A scan takes what every step takes."""
        return self.flops_per_state_element * self.state_elements + 0 * block

    @property
    def host_tensors(self) -> tuple[str, ...]:
        """All between the projections and the output's."""
        names = "convolution", "selection", "step", "step_bias", "decay", "skip"
        return *names, "convolution_bias", "step_norm", "input_norm", "read_norm"

    @property
    def state_heads(self) -> int:
        """Units are on their own."""
        return self.inner_size

    def shares(self, ranks: int, whole: int) -> dict[str, int]:  # noqa: ARG002 - others need it
        """Units."""
        return {"inner_size": self.inner_size // ranks}

    @property
    def convolved(self) -> Sections:
        """The units."""
        return (Section(self.inner_size),)

    @property
    def projected(self) -> Sections:
        """Units and their gate."""
        return 2 * self.convolved

    @property
    def float32_elements(self) -> int:
        """Units, steps and outputs, and what enters and is read of the state."""
        return 3 * self.inner_size + 2 * self.state_size


@final
@dataclass(frozen=True, kw_only=True)
class Mamba2(RecurrentMixer):
    """A state of each head (arXiv 2405.21060), as in Nemotron-H: `head_dim` × `state_size` numbers.

    What enters the state and is read of it is shared by the heads of each of `num_groups`. These and
    the heads' values are convolved. A gate as wide as the values scales the output before its norm.
    """

    chunk_tokens: ClassVar[int] = 128
    hidden_size: int
    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int = 1
    conv_kernel: int = 4
    vectors: Vectors = ()
    block: Literal["mamba2"] = "mamba2"

    def __post_init__(self) -> None:
        """Reject impossible dimensions (ModelError)."""
        self.check_sizes("hidden_size", "num_heads", "head_dim", "state_size", "num_groups", "conv_kernel")
        self.require(self.num_heads % self.num_groups == 0, "num_groups", f"must divide num_heads {self.num_heads}")
        check_vectors("vectors", self.vectors)

    @property
    def words(self) -> str:
        """What it is, for people."""
        state = f"a state of {self.head_dim} x {self.state_size}"
        return f"Mamba-2: {self.num_heads} heads with {state}, convolution over {self.conv_kernel}"

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Norms, one matrix to all that is projected, the convolution, decays and the output."""
        heads, hidden = self.num_heads, self.hidden_size
        parts = (self.returned_elements, self.convolved_elements, heads)
        return (
            TensorSpec("attention_norm", (hidden,), Unit.MIXER),
            TensorSpec("projections", (sum(parts), hidden), Unit.MIXER, 0, parts),
            TensorSpec("convolution", (self.convolved_elements, self.conv_kernel), Unit.MIXER, 0),
            TensorSpec("decay", (heads,), Unit.MIXER, 0),
            TensorSpec("step_bias", (heads,), Unit.MIXER, 0),
            TensorSpec("skip", (heads,), Unit.MIXER, 0),
            TensorSpec("output_norm", (self.returned_elements,), Unit.MIXER, 0),
            TensorSpec("output", (hidden, self.returned_elements), Unit.MIXER, 1),
            *vector_tensors(self.vectors, Unit.MIXER),
        )

    @property
    def returned_elements(self) -> int:
        """A value of every head."""
        return self.num_heads * self.head_dim

    @property
    def state_elements(self) -> int:
        """Of every head its own."""
        return self.returned_elements * self.state_size

    @property
    def flops_per_state_element(self) -> int:
        """Decaying takes 1, adding and reading take 2 each."""
        return 5

    def block_flops(self, block: Number) -> Number:
        """As products of matrices (arXiv 2405.21060, §6).

        For each token of a block, those with the others take 2 FLOPs an element: what is read with
        what enters, in every group, and the weights of these with the values; and two with the state.
        """
        within = block * (self.num_groups * self.state_size + self.returned_elements)
        return 2 * within + 4 * self.state_elements

    @property
    def host_tensors(self) -> tuple[str, ...]:
        """The convolution with decays, steps and skips."""
        return "convolution", "convolution_bias", "decay", "step_bias", "skip"

    @property
    def state_heads(self) -> int:
        """Groups, each with its heads."""
        return self.num_groups

    def shares(self, ranks: int, whole: int) -> dict[str, int]:  # noqa: ARG002 - others need it
        """Groups with their heads."""
        return {"num_heads": self.num_heads // ranks, "num_groups": self.num_groups // ranks}

    @property
    def convolved(self) -> Sections:
        """Values of all heads, and of every group what enters the state and what reads it."""
        groups = Section(self.num_groups, self.state_size)
        return Section(self.num_heads, self.head_dim), groups, groups

    @property
    def projected(self) -> Sections:
        """A gate, all that is convolved, and a step of every head."""
        return Section(self.num_heads, self.head_dim), *self.convolved, Section(self.num_heads)

    @property
    def float32_elements(self) -> int:
        """All that is convolved, outputs, and a block's products in every head."""
        return self.convolved_elements + self.returned_elements + self.num_heads * self.chunk_tokens
