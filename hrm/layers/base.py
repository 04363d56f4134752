"""What a layer is made of: blocks, which know all that a plan needs of them.

A new kind of block is a file with a frozen dataclass that is a `Mixer` or a `FeedForward`. Whatever
is asked of a model is a sum, or the largest, over the blocks of its layers.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from functools import cached_property
from math import prod
from typing import Any, ClassVar, Final, NamedTuple, Self

from hrm.errors import ModelError
from hrm.formats import Format, Formats, PackedFormat, aligned
from hrm.layers.work import Operator
from hrm.numeric import Number, minimum

# Beyond these a number is a mistake; below, 64-bit integers count any plan's bytes.
LARGEST_SIZE: Final = 10**8
LARGEST_MODEL: Final = 10**15
# Names and sizes of the small vectors beside a block's matrices: biases, norms, sinks.
Vectors = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class HashedOnce:
    """A frozen dataclass that is a key of many tables: its hash is worked out once, in each process that it comes to.

    A class says `__hash__ = HashedOnce.__hash__`, or dataclasses make another.
    """

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, item.name) for item in fields(self) if item.compare))

    def __hash__(self) -> int:
        """That of the fields that are compared."""
        return self._hash

    def __getstate__(self) -> dict[str, object]:
        """The fields alone: a hash of names, and what was worked out by it, holds in one process."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


class Unit(StrEnum):
    """What is placed as one: a layer's tensors of a unit are all on the GPU, or none of them is."""

    MIXER = "mixer"
    FFN = "ffn"  # what every token goes through, routers and shared experts included
    EXPERT = "expert"  # one of the routed experts
    MODEL = "model"  # what lies outside the layers


class TensorSpec(NamedTuple):
    """A tensor of a block: `split` is the axis that GPUs in tensor parallel divide, if any.

    `parts` are the rows of each of the matrices that it joins, if it joins any. A `packed` one has that
    format, and others the one that a plan has for weights.
    """

    name: str
    shape: tuple[int, ...]
    unit: Unit
    split: int | None = None
    parts: tuple[int, ...] = ()
    packed: PackedFormat | None = None

    @property
    def parameters(self) -> int:
        """Its elements."""
        return prod(self.shape)

    @property
    def sections(self) -> "Sections":
        """Its rows as GPUs in tensor parallel divide them: each of the matrices that it joins, if any."""
        return tuple(Section(size) for size in self.parts or self.shape[:1]) if self.split == 0 else ()

    def bytes_in(self, plain: Format) -> int:
        """Its bytes; `plain` is the format of what is not packed."""
        if self.packed is None:
            return int(plain.bytes_of(self.parameters))
        rows, width = self.shape
        return self.packed.bytes_of(rows, width)


class Section(NamedTuple):
    """Rows of a tensor that GPUs in tensor parallel divide on their own: a `number` of heads or units of `size` rows.

    Where there are fewer heads than GPUs, several GPUs have the same one.
    """

    number: int
    size: int = 1


Sections = tuple[Section, ...]


def rows_in(sections: Sections) -> int:
    """Rows of all sections together."""
    return sum(section.number * section.size for section in sections)


def places(tensors: Sequence[TensorSpec], plain: Format) -> tuple[list[int], int]:
    """Where each tensor begins in the memory that they have together, and how many bytes that is.

    Packed ones are aligned, and so is the end, where another unit's may begin.
    """
    starts, end = list[int](), 0
    for tensor in tensors:
        starts.append(aligned(end) if tensor.packed is not None else end)
        end = starts[-1] + tensor.bytes_in(plain)
    return starts, aligned(end)


class Block(ABC):
    """A part of a layer that reads the hidden state and adds to it, with a norm of its own.

    Of tensors of the unit EXPERT there is one set for each of the routed experts. In files, `block`
    says which kind it is: `variants` of a class are its kinds by that name, as soon as they are
    defined.
    """

    variants: ClassVar[dict[str, type["Block"]]]
    hidden_size: int
    vectors: Vectors

    def __init_subclass__(cls) -> None:
        """Make the kind known by its name."""
        super().__init_subclass__()
        if cls.__base__ is Block:  # the two kinds that a layer has a place for
            cls.variants = {}
        elif "block" in cls.__dict__:
            cls.variants[cls.__dict__["block"]] = cls

    @property
    @abstractmethod
    def tensors(self) -> tuple[TensorSpec, ...]:
        """All tensors, in the order in which they lie in memory."""

    @cached_property
    def dense_parameters(self) -> int:
        """Parameters outside routed experts."""
        return sum(tensor.parameters for tensor in self.tensors if tensor.unit is not Unit.EXPERT)

    @property
    def host_tensors(self) -> tuple[str, ...]:
        """Names of the tensors that the CPU needs in its memory for its part: attention, or experts."""
        return ()

    @cached_property
    def host_parameters(self) -> int:
        """Parameters that the CPU's part needs there, though they are resident on the GPU."""
        return sum(tensor.parameters for tensor in self.tensors if tensor.name in self.host_tensors)

    def host_bytes(self, plain: Format) -> int:
        """Their bytes; they are never packed."""
        here = (tensor for tensor in self.tensors if tensor.name in self.host_tensors)
        return sum(aligned(int(plain.bytes_of(tensor.parameters))) for tensor in here)

    @abstractmethod
    def obstacle_to(self, ranks: int) -> str:
        """Why so many GPUs in tensor parallel cannot divide it; empty if they can."""

    @abstractmethod
    def shares(self, ranks: int, whole: int) -> dict[str, int]:
        """The sizes that one of so many GPUs in tensor parallel has of it, by field.

        An inner size is rounded up to so many `whole` units, where packed formats need that.
        """

    @property
    def sections(self) -> Mapping[str, Sections]:
        """How GPUs in tensor parallel divide rows of which the tensor itself does not say it: of vectors, and of heads.

        A vector of another size is whole on every GPU.
        """
        return {}

    def sections_of(self, tensor: TensorSpec) -> Sections:
        """How the rows of one of its tensors are divided; none if every GPU has all of them."""
        told = self.sections.get(tensor.name, ())
        return told if rows_in(told) == tensor.shape[0] else tensor.sections

    @property
    def summed_vectors(self) -> Collection[str]:
        """Biases of matrices whose columns are divided: of the sum over all GPUs, so the first one alone has them."""
        return {f"{tensor.name}_bias" for tensor in self.tensors if tensor.split == 1}

    def of_rank(self, ranks: int, whole: int = 1) -> Self:
        """What one of so many GPUs in tensor parallel has of it; vectors that go with nothing divided are whole."""
        block: Any = self
        narrow = replace(block, **self.shares(ranks, whole))
        return replace(narrow, vectors=self.vectors_of_rank(self.vectors, narrow))

    def vectors_of_rank(self, vectors: Vectors, narrow: "Block") -> Vectors:
        """What a GPU has of vectors whose matrices it has as `narrow` does."""
        ours, its = self.sections, narrow.sections
        divided = {name for name, size in vectors if rows_in(ours.get(name, ())) == size}
        return tuple((name, rows_in(its[name]) if name in divided else size) for name, size in vectors)

    def with_vectors(self, **sizes: int) -> Self:
        """The same with further small vectors, each a name and a size; 0 for none."""
        block: Any = self
        return replace(block, vectors=(*self.vectors, *((name, size) for name, size in sizes.items() if size)))

    def check_sizes(self, *names: str, at_least: int = 1) -> None:
        """Raise ModelError naming the field unless these are integers of at least that."""
        for name in names:
            check_size(name, getattr(self, name), at_least=at_least)

    def require(self, holds: bool, name: str, rule: str) -> None:  # noqa: FBT001
        """Raise ModelError naming the field unless the rule holds."""
        if not holds:
            raise ModelError(name, getattr(self, name), rule, "check the config")


class Mixer(Block):
    """The block of a layer in which tokens see one another: some kind of attention.

    It is computed in three tasks: projections before, attention itself with what is cached, on
    either processor, and an output projection after. `window` is how many tokens attention reaches
    back at most, 0 for all, and `streams` how many residual streams a hidden state has.
    """

    window: int = 0
    streams: int = 1

    @property
    @abstractmethod
    def words(self) -> str:
        """What it is, for people."""

    @property
    @abstractmethod
    def cached_elements(self) -> int:
        """Elements that one token adds to the cache of this layer."""

    @property
    def cached_parts(self) -> tuple[int, ...]:
        """These part by part: each has a scale of its own where a cache is quantised."""
        return (self.cached_elements,) if self.cached_elements else ()

    def cached_bytes(self, formats: Formats) -> int:
        """Bytes that one token adds to the cache of this layer."""
        return formats.kv_cache.row_bytes(self.cached_parts)

    @abstractmethod
    def state_bytes(self, formats: Formats) -> int:
        """Bytes that this layer keeps of each sequence, however long; written anew at every step."""

    @property
    @abstractmethod
    def sent_elements(self) -> int:
        """Elements of a token between the projections and attention, those that are cached included."""

    @property
    def held_elements(self) -> int:
        """Elements of a token that wait on the GPU for attention's output: a gate of it."""
        return 0

    def sent_bytes(self, formats: Formats) -> int:
        """Bytes of a new token that attention on the CPU needs: by default all that is sent, as it is computed."""
        return formats.compute.bytes_of(self.sent_elements)

    @property
    @abstractmethod
    def returned_elements(self) -> int:
        """Elements of a token's attention output, before the output projection."""

    def returned_bytes(self, formats: Formats) -> int:
        """Bytes of a token's attention output."""
        return formats.compute.bytes_of(self.returned_elements)

    @property
    def kept_rows(self) -> int:
        """Rows of a layer's cache that a sequence fills at most, in turn; 0 if every token has its own."""
        return self.window

    @abstractmethod
    def project(self, formats: Formats, tokens: Number) -> Operator:
        """Norm, projections and rotary embedding of so many tokens."""

    @abstractmethod
    def attend(self, formats: Formats, requests: Number, context: Number) -> Operator:
        """Decode attention of a new token of each request over a mean context."""

    @abstractmethod
    def prefill(self, formats: Formats, tokens: Number, prompt_len: Number) -> Operator:
        """All up to attention over a chunk of `tokens` in prompts of `prompt_len`.

        Prompts longer than the chunk are split, and a later part reads again what it needs of the
        earlier ones.
        """

    @abstractmethod
    def finish(self, formats: Formats, tokens: Number) -> Operator:
        """The output projection of so many tokens."""

    @property
    @abstractmethod
    def kept_elements(self) -> int:
        """Elements of a token that stay in the workspace throughout the layer."""

    @abstractmethod
    def temporary_bytes(self, compute: Format) -> int:
        """Bytes of a token that are needed for a while beside those that stay."""

    @property
    def block_bytes(self) -> int:
        """Bytes that prefill needs for a while for tokens that are computed at once, of however many."""
        return 0

    @abstractmethod
    def prefix_bytes(self, formats: Formats) -> int:
        """Bytes that a split prompt keeps on the GPU for each token of earlier parts."""

    @property
    @abstractmethod
    def prefix_in_cache(self) -> bool:
        """Whether the cache itself serves as what a split prompt keeps, if it holds plain numbers."""

    def keeps_prefix_in_cache(self, formats: Formats) -> bool:
        """Whether it does so in these formats: of codes attention in prefill needs the numbers."""
        return self.prefix_in_cache and not (self.cached_parts and formats.kv_cache.is_scaled)

    def reach(self, context: Number) -> Number:
        """Tokens that attention reaches, of `context` in all.

        Attention in chunks reaches at most so many: half of them on average in a long context.
        """
        return minimum(context, self.window) if self.window else context

    def cache_bytes(self, formats: Formats, requests: Number, tokens: Number) -> Number:
        """Bytes of this layer's cache for so many requests with so many tokens in all."""
        grown = tokens * self.cached_bytes(formats)
        state = self.state_bytes(formats)
        return grown + requests * state if state else grown

    def reached_bytes(self, formats: Formats, requests: Number, context: Number) -> Number:
        """Bytes of this layer's cache that attention reads for so many requests of a mean context."""
        return self.cache_bytes(formats, requests, requests * self.reach(context))

    def attended_bytes(self, formats: Formats, requests: Number, context: Number) -> Number:
        """Bytes that attention reads and writes of this layer's cache: of a state, both."""
        return self.reached_bytes(formats, requests, context) + requests * self.state_bytes(formats)


class FeedForward(Block):
    """A block of a layer in which every token is on its own."""

    @property
    @abstractmethod
    def inner_size(self) -> int:
        """The most elements that an FFN has between its matrices."""

    @property
    def pending_elements(self) -> int:
        """Elements of a token that wait until the output of all its experts is summed up."""
        return 0

    @abstractmethod
    def dense(self, formats: Formats, tokens: Number) -> Operator:
        """All that every one of so many tokens goes through."""


def share(size: int, ranks: int, whole: int = 1) -> int:
    """What the largest of so many equal shares of a size is, in so many whole units."""
    return whole * -(-size // (ranks * whole))


def check_size(name: str, value: Any, *, at_least: int = 1, at_most: int = LARGEST_SIZE) -> None:
    """Raise ModelError unless the value is an integer in that range."""
    if type(value) is not int or not at_least <= value <= at_most:
        kind = "a positive integer" if at_least == 1 else f"an integer of at least {at_least}"
        raise ModelError(name, value, f"must be {kind}, at most {at_most:,}", "check the config")


def check_vectors(name: str, vectors: Vectors) -> None:
    """Raise ModelError unless every vector has a size."""
    for vector, size in vectors:
        check_size(f"{name}: {vector}", size, at_most=LARGEST_MODEL)


def vector_tensors(vectors: Vectors, unit: Unit) -> tuple[TensorSpec, ...]:
    """The tensors of vectors, which every GPU has whole."""
    return tuple(TensorSpec(name, (size,), unit) for name, size in vectors)
