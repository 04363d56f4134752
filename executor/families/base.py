"""A model family as data: what its tensors are called, and the options that its config gives."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, final

from torch import Tensor

from executor.checkpoint import WeightSource
from executor.model import Architecture
from executor.model.layout import Tensors, dense_tensors, embedding_tensors, expert_tensors, head_tensors, views
from hrm.errors import ModelError
from hrm.layers import GroupedQueryAttention, Layer, TensorSpec
from hrm.model_spec import Keys, ModelSpec, decoder_keys, read_spec

SILU: Final = ("silu", "swish")
ROPE_SECTIONS: Final = ("rope_parameters", "rope_scaling", "attn_config")
OTHER_MODEL: Final = "use a model of a supported architecture"


@dataclass(frozen=True, slots=True)
class Stored:
    """How a checkpoint keeps a tensor of ours, or one of each expert.

    Several `names` have its rows one after the other. A name without {expert} has all experts'
    matrices, as a tensor of three axes or, if `flat`, one below the other. Matrices may be stored
    `transposed`.
    """

    names: tuple[str, ...]
    transposed: bool = False
    flat: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """A stored tensor, and the `rows` of ours that it has from its `first_row` on."""

    name: str
    shape: tuple[int, ...]
    first_row: int
    rows: slice
    transposed: bool


Names = Mapping[str, str | tuple[str, ...] | Stored]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The checkpoints of one family: their names for the tensors of `executor.model.layout`.

    `outside` names those outside the layers, and `names` those of a layer, each behind `layer`, where
    {layer} and {expert} are numbers. Several names have the rows of a tensor one after the other;
    what is stored in yet another way is `Stored`. `otherwise` has names that count where a checkpoint
    has them. `options` reads from a config what the maths must know, and refuses what we lack;
    `published` is what it finds in the config of the family's best known model.
    """

    outside: Mapping[str, str]
    layer: str
    names: Names
    otherwise: Names = field(default_factory=dict[str, str])
    options: Callable[[Keys, ModelSpec], Architecture]
    published: Mapping[str, Any]

    def architecture(self, config: dict[str, Any], where: str) -> Architecture:
        """Read a config; ModelError naming `where` and the key if it asks for what we lack."""
        keys = decoder_keys(config, where)
        spec = read_spec(keys)
        try:
            return self._architecture(keys, spec)
        except ModelError as error:  # of a block, which does not know where its sizes are from
            where = error.where if error.where.startswith(where) else f"{where}: {error.where}"
            raise ModelError(where, error.value, error.rule, error.remedy) from error

    def published_architecture(self, spec: ModelSpec) -> Architecture:
        """The family's published model at any dimensions, for runs without a checkpoint."""
        return self._architecture(Keys(dict(self.published), f"--model {spec.name}"), spec)

    def _architecture(self, keys: Keys, spec: ModelSpec) -> Architecture:
        """With whole attention in every layer: a window only bounds what a request may reach."""
        return replace(
            self.options(keys, spec.without_windows),
            window=min((layer.window for layer in spec.layers if layer.window), default=None),
            bos_token_id=next(iter(keys.token_ids("bos_token_id")), None),
            eos_token_ids=keys.token_ids("eos_token_id"),
        )

    def expected_tensors(self, arch: Architecture, stored: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that a checkpoint has.

        What may be stored in several ways is as in `stored`, the names that a checkpoint has. If one of these lacks an
        expert's tensors, those are the last that are told: a config may ask for any number more.
        """
        spec = arch.spec
        shapes: dict[str, tuple[int, ...]] = {}
        for tensor in (*embedding_tensors(spec), *head_tensors(spec)):
            shapes |= {piece.name: piece.shape for piece in self._pieces(tensor, spec, stored)}
        for index, layer in enumerate(spec.layers):
            for tensor in dense_tensors(layer):
                shapes |= {piece.name: piece.shape for piece in self._pieces(tensor, spec, stored, index)}
            for expert in range(layer.num_experts):
                known = len(shapes)
                for tensor in expert_tensors(layer):
                    shapes |= {piece.name: piece.shape for piece in self._pieces(tensor, spec, stored, index, expert)}
                if len(shapes) == known:  # all experts lie in the same tensors
                    break
                if stored and next(reversed(shapes)) not in stored:
                    return shapes
        return shapes

    def load(
        self,
        source: WeightSource,
        spec: ModelSpec,
        tensors: Tensors,
        flat: Tensor,
        layer: int = 0,
        expert: int | None = None,
    ) -> None:
        """Fill a vector with the tensors that lie in it: an expert's, a layer's others, or those outside."""
        for tensor, ours in zip(tensors, views(tensors, flat).values(), strict=True):
            for piece in self._pieces(tensor, spec, source.names, layer, expert):
                rows = ours[piece.rows]
                source.read_into(piece.name, rows.T if piece.transposed else rows, piece.first_row)

    def _pieces(
        self, tensor: TensorSpec, spec: ModelSpec, stored: Collection[str], layer: int = 0, expert: int | None = None
    ) -> Iterator[Piece]:
        """The stored tensors that have one of ours; `expert` says whose, if it is one of each expert."""
        how = self._how(tensor.name, spec, stored, layer, expert)
        sizes, end = tensor.parts if len(how.names) > 1 else tensor.shape[:1], 0
        for name, size in zip(how.names, sizes, strict=True):
            start, end = end, end + size
            shape = (size, *tensor.shape[1:])
            shape, first_row = shape[::-1] if how.transposed else shape, 0
            if expert is not None and "{expert}" not in name:
                first_row, count = expert * shape[0], spec.num_experts
                shape = (count * shape[0], *shape[1:]) if how.flat else (count, *shape)
            theirs = name.format(layer=layer, expert=expert)
            yield Piece(theirs, shape, first_row, slice(start, end), how.transposed)

    def _how(self, name: str, spec: ModelSpec, stored: Collection[str], layer: int, expert: int | None) -> Stored:
        if name in self.outside:
            return Stored((self._outside(name, stored, tied=spec.tied_embeddings),))
        for names in (self.otherwise, self.names):
            how = names.get(name)
            if how is None:
                continue
            how = how if isinstance(how, Stored) else Stored((how,) if isinstance(how, str) else how)
            how = replace(how, names=tuple(self.layer + each for each in how.names))
            if names is self.names or how.names[0].format(layer=layer, expert=expert) in stored:
                return how
        raise AssertionError(name)

    def _outside(self, name: str, stored: Collection[str], *, tied: bool) -> str:
        """Tied, either may be stored alone; a stored head counts, as in transformers."""
        embedding, head = self.outside["embedding"], self.outside["lm_head"]
        if not tied or name not in {"embedding", "lm_head"}:
            return self.outside[name]
        return next((each for each in (self.outside[name], head) if each in stored), embedding)


def grouped_query(layer: Layer) -> GroupedQueryAttention:
    """The attention of a layer, whose heads are rotated.

    Raises ModelError if they cannot be.
    """
    block = layer.mixer
    assert isinstance(block, GroupedQueryAttention), block
    block.require(block.head_dim % 2 == 0, "head_dim", "must be even for the rotary embedding")
    return block


def rope_theta(keys: Keys, default: float) -> float:
    """The base of the rotary embedding: at the top, or in the sections that have had it.

    Raises ModelError if it is given twice and differs, or the embedding is scaled or partial.
    """
    for name in ("rope_parameters", "rope_scaling"):
        _check_unscaled(keys, name)
    given: dict[str, float] = {}
    for section in (keys, *(keys.section(name) for name in ROPE_SECTIONS if keys.get(name) is not None)):
        if section.get("partial_rotary_factor") not in (1, None):
            raise section.refusal("partial_rotary_factor", "must be 1: whole heads are rotated", OTHER_MODEL)
        if section.get("rope_theta") is None:
            continue
        theta = section.number("rope_theta")
        first = next(iter(given.items()), None)
        if first is not None and first[1] != theta:
            raise section.refusal(
                "rope_theta",
                f"must be {first[1]} as {first[0]} is: readers of such a config differ in which they take",
                "remove the one that the model was not trained with",
            )
        given[f"{section.path}: rope_theta" if section.path else "rope_theta"] = theta
    return next(iter(given.values()), float(default))


def _check_unscaled(keys: Keys, name: str) -> None:
    section = keys.get(name)
    if section is None:
        return
    rope: Any = section if isinstance(section, dict) else {"type": section}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" and not (kind == "linear" and rope.get("factor") == 1):
        rule = "must be of type default: scaled positions are not supported"
        raise keys.refusal(name, rule, "use a model without rope scaling")
