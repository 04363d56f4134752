"""What the maths must know of a model besides its dimensions; made by `executor.families`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from executor.model.feed_forward import FeedForward
from executor.model.mixers import Mixer
from executor.model.norm import PLAIN, Norm
from executor.model.numbers import Reach
from hrm.errors import ModelError
from hrm.layers import Layer
from hrm.model_spec import ModelSpec
from hrm.parallel import undivided_vector


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMaths:
    """The maths of one layer."""

    mixer: Mixer
    ffn: FeedForward


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A decoder: the maths of its layers, and of what comes before and after them.

    Embeddings and logits are multiplied by their scales. Logits are then bent to stay below `softcap`,
    if there is one. Texts of more than `first_positions` go through `long_layers`, if there are any.
    Where a text may have no more than `max_position_embeddings` for a reason that is not the model's,
    `why_no_longer` says so. What one of several ranks has of a model has that rank's number, what a stage of a
    pipeline has begins at `first_layer`, and both know the `whole` that is divided.
    """

    spec: ModelSpec
    layers: tuple[LayerMaths, ...]
    final_norm: Norm = PLAIN
    embedding_scale: float = 1.0
    logits_scale: float = 1.0
    softcap: float | None = None
    max_position_embeddings: int = 4096
    why_no_longer: str = ""
    first_positions: int = 0
    long_layers: tuple[LayerMaths, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    rank: int = 0
    first_layer: int = 0
    whole: ModelSpec | None = None

    @staticmethod
    def of(spec: ModelSpec, maths: Callable[[Layer], LayerMaths], **others: Any) -> "Architecture":
        """The architecture with the maths of each layer, which follows from the layer alone."""
        of_kind = cache(maths)
        return Architecture(spec=spec, layers=tuple(of_kind(layer) for layer in spec.layers), **others)

    def of_rank(self, rank: int, spec: ModelSpec) -> "Architecture":
        """What one of several ranks has of it, whose part of the model is `spec`, see `ModelSpec.of_rank`.

        Hidden states go on in rank 0, and the others add to them. Raises ModelError if what ranks have cannot
        simply be added up, as of norms over what they divide.
        """
        undivided = undivided_vector(self.spec, spec)
        if undivided:
            raise ModelError(
                f"{self.spec.name}: {undivided}",
                f"<of {spec.ranks} ranks>",
                "needs the whole of what each rank has a part of",
                "solve a policy with hrm search --parallelism pipeline, or for one GPU",
            )

        def narrowed(layers: tuple[LayerMaths, ...]) -> tuple[LayerMaths, ...]:
            return tuple(
                replace(
                    maths,
                    mixer=replace(maths.mixer, block=layer.mixer),
                    ffn=replace(maths.ffn, carries_hidden=rank == 0),
                )
                for maths, layer in zip(layers, spec.layers, strict=False)
            )

        layers, long_layers = narrowed(self.layers), narrowed(self.long_layers)
        return replace(self, spec=spec, layers=layers, long_layers=long_layers, rank=rank, whole=self.spec)

    def first_layers(self, count: int) -> "Architecture":
        """Its first layers alone, as a model of its own."""
        spec = self.spec.with_layers(self.spec.layers[:count])
        return replace(self, spec=spec, layers=self.layers[:count], long_layers=self.long_layers[:count])

    def of_stage(self, spec: ModelSpec, first_layer: int) -> "Architecture":
        """What one of several stages has of it, which begins there, see `hrm.parallel.ranks_of`."""

        def cut(layers: tuple[LayerMaths, ...]) -> tuple[LayerMaths, ...]:
            return layers[first_layer : first_layer + spec.num_layers]

        layers, long_layers = cut(self.layers), cut(self.long_layers)
        return replace(
            self, spec=spec, layers=layers, long_layers=long_layers, first_layer=first_layer, whole=self.spec
        )

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary, whatever part of it a rank has."""
        return (self.whole or self.spec).vocab_size

    @property
    def first_token(self) -> int | None:
        """The first one in a rank's part of the vocabulary; None of one that has all of it."""
        return None if self.spec.ranks == 1 else self.rank * self.spec.vocab_size

    def is_long(self, num_positions: int) -> bool:
        """Whether a text with so many positions goes through other layers than a short one."""
        return bool(self.long_layers) and num_positions > self.first_positions

    def for_positions(self, num_positions: int) -> "Architecture":
        """The architecture that a text with so many positions goes through from its first token on."""
        long_layers = self.long_layers[: self.spec.num_layers]  # a bench may have cut the model
        return replace(self, layers=long_layers) if self.is_long(num_positions) else self

    @property
    def reaches(self) -> tuple[Reach, ...]:
        """Those of all layers, each once."""
        return tuple(dict.fromkeys(layer.mixer.reach for layer in self.layers))
