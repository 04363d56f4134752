"""A model family as data: what its tensors are called, and the options that its config gives."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, final

from torch import Tensor

from executor.checkpoint import Expected, WeightSource
from executor.families.names import LAYER, OUTSIDE
from executor.families.rope import Rope
from executor.families.stored import Joined, Names, Stored, is_stored, stored_as
from executor.model import Architecture, FeedForward, GroupedQuery, LayerMaths, Norm, Router
from executor.model.layout import Tensors, dense_tensors, expert_tensors, in_order
from hrm.errors import ModelError
from hrm.layers import Block, GroupedQueryAttention, Layer, TensorShare, layer_shares, tensor_share
from hrm.model_spec import Keys, ModelSpec, decoder_keys, spec_as_stored


@final
@dataclass(frozen=True, slots=True)
class RankPart:
    """What one of several ranks has of a model: the narrower `spec`, and with which `rank` its shares begin."""

    spec: ModelSpec
    rank: int

    def expert_of(self, layer: int, expert: int) -> int:
        """Which of the model's experts one of ours is, or is a part of."""
        return self.spec.layers[layer].experts_of(self.rank)[expert]

    def of(self, whole: ModelSpec, tensors: Tensors, layer: int) -> tuple[Tensors, Mapping[str, TensorShare]]:
        """The model's tensors of which these are ours, and our share of each."""
        ranks = self.spec.ranks
        theirs = {tensor.name: tensor for tensor in (*whole.embedding_tensors, *whole.head_tensors)}
        if tensors[0].name in theirs:
            shares = {its.name: tensor_share(theirs[its.name], its, self.rank, ranks) for its in tensors}
        else:
            theirs = {tensor.name: tensor for tensor in whole.layers[layer].tensors}
            shares = layer_shares(whole.layers[layer], self.spec.layers[layer], self.rank, ranks)
        return tuple(theirs[its.name] for its in tensors), shares


SILU: Final = ("silu", "swish")
PLAIN_ROUTER: Final = Router()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The checkpoints of one family: their names for the tensors of `executor.model.layout`.

    `outside` names those outside the layers, and `names` those of a layer, each behind `layer`, where
    {layer} and {expert} are numbers; both are those of most models if not given. Several names have the
    rows of a tensor one after the other; what is stored in yet another way is `Stored`. In blocks of a
    class, what `kinds` has for it counts before that. Each of `otherwise` has names that count where a
    checkpoint has them. `options` reads from a config what the maths must know, and refuses what we
    lack; `published` is what it finds in the config of the family's best known model.
    """

    outside: Mapping[str, str] = field(default_factory=lambda: OUTSIDE)
    layer: str = LAYER
    names: Names
    kinds: Mapping[type[Block], Names] = field(default_factory=dict[type[Block], Names])
    otherwise: tuple[Names, ...] = ()
    options: Callable[[Keys, ModelSpec], Architecture]
    published: Mapping[str, Any]

    def architecture(self, config: dict[str, Any], where: str) -> Architecture:
        """Read a config; ModelError naming `where` and the key if it asks for what we lack."""
        keys = decoder_keys(config, where)
        spec = spec_as_stored(keys)
        try:
            return self._architecture(keys, spec)
        except ModelError as error:  # of a block, which does not know where its sizes are from
            where = error.where if error.where.startswith(where) else f"{where}: {error.where}"
            raise ModelError(where, error.value, error.rule, error.remedy) from error

    def published_architecture(self, spec: ModelSpec) -> Architecture:
        """The family's published model at any dimensions, for runs without a checkpoint."""
        return self._architecture(Keys(dict(self.published), f"--model {spec.name}"), spec)

    def _architecture(self, keys: Keys, spec: ModelSpec) -> Architecture:
        return replace(
            self.options(keys, spec),
            bos_token_id=next(iter(keys.token_ids("bos_token_id")), None),
            eos_token_ids=keys.token_ids("eos_token_id"),
        )

    def expected_tensors(self, arch: Architecture, stored: Collection[str] = ()) -> dict[str, Expected]:
        """Name, shape and format of every tensor that a checkpoint has.

        What may be stored in several ways is as in `stored`, the names that a checkpoint has. If one of these lacks an
        expert's tensors, those are the last that are told: a config may ask for any number more.
        """
        spec = arch.spec
        expected: dict[str, Expected] = {}

        def add(tensors: Tensors, layer: int = 0, expert: int | None = None) -> None:
            for joined in self.joined(tensors, spec, stored, layer, expert):
                expected.update((piece.name, Expected(piece.shape, joined.tensor.packed)) for piece in joined.pieces)

        add((*spec.embedding_tensors, *spec.head_tensors))
        for index, layer in enumerate(spec.layers):
            add(dense_tensors(layer), index)
            for expert in range(layer.num_experts):
                known = len(expected)
                add(expert_tensors(layer), index, expert)
                if len(expected) == known:  # all experts lie in the same tensors
                    break
                if stored and next(reversed(expected)) not in stored:
                    return expected
        return expected

    def load(
        self,
        source: WeightSource,
        spec: ModelSpec,
        tensors: Tensors,
        flat: Tensor,
        layer: int = 0,
        expert: int | None = None,
        *,
        part: RankPart | None = None,
    ) -> None:
        """Fill a vector with the tensors that lie in it: an expert's, a layer's others, or those outside.

        Of several ranks one fills it with what it has of each of the model's, which `spec` tells; of experts
        it counts those that it has.
        """
        stored, shares = (tensors, dict[str, TensorShare]()) if part is None else part.of(spec, tensors, layer)
        if part is not None and expert is not None:
            expert = part.expert_of(layer, expert)
        ours = in_order(tensors, flat)
        for joined, matrix in zip(self.joined(stored, spec, source.names, layer, expert), ours, strict=True):
            joined.read(source, matrix, shares.get(joined.tensor.name))

    def has_one_head(self, spec: ModelSpec, stored: Collection[str]) -> bool:
        """Whether head and embedding are the same stored tensor."""
        head, embedding = (self._outside(name, stored, tied=spec.tied_embeddings) for name in ("lm_head", "embedding"))
        return head == embedding

    def apart(self) -> "Family | None":
        """The family as it names tensors where each expert's are on their own; None if they never are."""
        for names in (self.names, *self.otherwise):
            how = stored_as(names, "w2", "")
            if how is not None and all("{expert}" in name for name in how.names):
                return replace(self, names={**self.names, **names}, otherwise=())
        return None

    def joined(
        self, tensors: Tensors, spec: ModelSpec, stored: Collection[str], layer: int = 0, expert: int | None = None
    ) -> Iterator[Joined]:
        """How tensors are stored that are outside the layers, or of one and in the order of its blocks."""
        blocks = spec.layers[layer].blocks
        of_layer = iter([(block, tensor) for block in blocks for tensor in spec.layers[layer].tensors_of(block)])
        for tensor in tensors:
            if tensor.name in self.outside:
                name = self._outside(tensor.name, stored, tied=spec.tied_embeddings)
                yield Joined.of(tensor, Stored((name,)), None, layer, expert)
                continue
            block = next(block for block, other in of_layer if other == tensor)
            yield Joined.of(tensor, self._how(tensor.name, block, stored, layer, expert), block, layer, expert)

    def _how(self, name: str, block: Block, stored: Collection[str], layer: int, expert: int | None) -> Stored:
        for names in self.otherwise:
            how = stored_as(names, name, self.layer)
            if how is not None and is_stored(how, stored, layer, expert):
                return how
        ours = (stored_as(names, name, self.layer) for names in (self.kinds.get(type(block), {}), self.names))
        return next(how for how in ours if how is not None)

    def _outside(self, name: str, stored: Collection[str], *, tied: bool) -> str:
        """Tied, either may be stored alone; a stored head counts, as in transformers."""
        embedding, head = self.outside["embedding"], self.outside["lm_head"]
        if not tied or name not in {"embedding", "lm_head"}:
            return self.outside[name]
        return next((each for each in (self.outside[name], head) if each in stored), embedding)


def decoder(
    spec: ModelSpec,
    *,
    norm: Norm,
    rope: Rope,
    interleaved: bool = False,
    router: Router = PLAIN_ROUTER,
    head_norm: Norm | None = None,
    **of_mixer: Any,
) -> Architecture:
    """Grouped-query attention and the same FFN in every layer, with one norm before each and at the end.

    `of_mixer` are further options of GroupedQuery.
    """
    ffn = FeedForward(norm=norm, router=router, experts_per_token=spec.experts_per_token)

    def maths(layer: Layer, rope: Rope) -> LayerMaths:
        block = grouped_query(layer)
        rotary = rope.rotary(block.head_dim, interleaved=interleaved)
        mixer = GroupedQuery(block=block, norm=norm, rotary=rotary, head_norm=head_norm, **of_mixer)
        return LayerMaths(mixer=mixer, ffn=ffn)

    return rope.architecture(spec, maths, final_norm=norm)


def grouped_query(layer: Layer) -> GroupedQueryAttention:
    """The attention of a layer, whose heads are rotated.

    Raises ModelError if they cannot be.
    """
    block = layer.mixer
    assert isinstance(block, GroupedQueryAttention), block
    block.require(block.head_dim % 2 == 0, "head_dim", "must be even for the rotary embedding")
    return block
