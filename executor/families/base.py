"""What a model family tells: its architecture by config, its tensors' names, their quirks.

D hidden, V vocab.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any, ClassVar, Final, final

from torch import Tensor

from executor.checkpoint import WeightSource
from executor.model.architecture import Architecture
from executor.model.layout import DenseWeights, ExpertWeights
from hrm.errors import ModelError
from hrm.model_spec import ModelSpec


class AbstractFamily(ABC):
    """Reads the checkpoints of one family into the layout that all families share.

    A family names the tensors outside its layers and says where those of a layer lie.
    """

    embedding: ClassVar[str]
    final_norm: ClassVar[str]
    lm_head: ClassVar[str]

    @abstractmethod
    def architecture(self, config: dict[str, Any], where: str) -> Architecture:
        """Read a config; ModelError naming `where` and the key if it asks for what we lack."""

    @abstractmethod
    def published_architecture(self, spec: ModelSpec) -> Architecture:
        """The family's published models at any dimensions, for runs without a checkpoint."""

    @abstractmethod
    def layer_tensors(self, arch: Architecture, layer: int, stored: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of a layer, as named among those that are stored."""

    @abstractmethod
    def load_dense(self, source: WeightSource, arch: Architecture, layer: int, out: DenseWeights) -> None:
        """Fill the dense part of a layer."""

    @abstractmethod
    def load_expert(
        self, source: WeightSource, arch: Architecture, layer: int, expert: int, out: ExpertWeights
    ) -> None:
        """Fill one expert of a layer."""

    @final
    def expected_tensors(self, arch: Architecture, stored: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that a checkpoint has.

        What may be stored in several ways is as in `stored`, the names that a checkpoint has.
        """
        spec = arch.spec
        matrix, tied = (spec.vocab_size, spec.hidden_size), spec.tied_embeddings
        shapes: dict[str, tuple[int, ...]] = {
            self._embedding_in(stored) if tied else self.embedding: matrix,
            self._head_in(stored, tied=tied): matrix,
            self.final_norm: (spec.hidden_size,),
        }
        for layer in range(spec.num_layers):
            shapes |= self.layer_tensors(arch, layer, stored)
        return shapes

    def _embedding_in(self, stored: Collection[str]) -> str:
        """Where the embedding is: one that is tied may be stored as the LM head alone."""
        only_head = self.lm_head in stored and self.embedding not in stored
        return self.lm_head if only_head else self.embedding

    def _head_in(self, stored: Collection[str], *, tied: bool) -> str:
        """Where the LM head is: a stored one counts, as in transformers, though it be tied."""
        return self.embedding if tied and self.lm_head not in stored else self.lm_head

    @final
    def load_embedding(self, source: WeightSource, out_VD: Tensor) -> None:
        """Fill the token embedding."""
        source.read_into(self._embedding_in(source.names), out_VD)

    @final
    def load_head(self, source: WeightSource, arch: Architecture, final_norm_D: Tensor, lm_head_VD: Tensor) -> None:
        """Fill the final norm and the LM head, from the embedding if they are tied."""
        source.read_into(self.final_norm, final_norm_D)
        head = self._head_in(source.names, tied=arch.spec.tied_embeddings)
        source.read_into(head, lm_head_VD)


def token_ids(config: dict[str, Any], where: str, key: str) -> tuple[int, ...]:
    """The token ids under `key`: none, one or several."""
    value = config.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise ModelError(
                f"{where}: {key}",
                value,
                "must be a token id or a list of them",
                "correct it in config.json or generation_config.json",
            )
    return tuple(ids)


def positive(config: dict[str, Any], where: str, key: str, default: float | None) -> float:
    """The positive number under `key`, or the default if the key is missing or null."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ModelError(
            f"{where}: {key}",
            "<missing>" if value is None else value,
            "must be a positive number",
            "check the config.json",
        )
    return value


ROPE_SECTIONS: Final = ("rope_parameters", "rope_scaling", "attn_config")


def rope_theta(config: dict[str, Any], where: str, default: float) -> float:
    """The base of the rotary embedding: at the top, or in the sections that have had it.

    Raises ModelError if it is given twice and differs, or the embedding is scaled or partial.
    """
    given: dict[str, float] = {}
    for key in ("", *ROPE_SECTIONS):
        section = config.get(key) if key else config
        if section is None:
            continue
        _check_unscaled(section, where, key)
        if section.get("rope_theta") is not None:
            path = f"{where}: {key}" if key else where
            given[f"{key}: rope_theta" if key else "rope_theta"] = float(positive(section, path, "rope_theta", None))
    for name, value in given.items():
        first, theta = next(iter(given.items()))
        if value != theta:
            raise ModelError(
                f"{where}: {name}",
                value,
                f"must be {theta} as {first} is: readers of such a config differ in which they take",
                "remove the one that the model was not trained with",
            )
    return next(iter(given.values()), float(default))


def _check_unscaled(section: Any, where: str, key: str) -> None:
    """Refuse rotary embeddings that are scaled or rotate a part of each head."""
    if key in {"rope_parameters", "rope_scaling"}:
        rope = section if isinstance(section, dict) else {"type": section}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" and not (kind == "linear" and rope.get("factor") == 1):
            raise ModelError(
                f"{where}: {key}",
                section,
                "must be of type default: scaled positions are not supported",
                "use a model without rope scaling",
            )
    if section.get("partial_rotary_factor", 1) not in {1, None}:
        raise ModelError(
            f"{where}: partial_rotary_factor",
            section["partial_rotary_factor"],
            "must be 1: whole heads are rotated",
            "use a model of a supported architecture",
        )


def require_silu(value: object, where: str) -> None:
    """Raise ModelError unless the experts' activation is SiLU."""
    if not isinstance(value, str) or value not in {"silu", "swish"}:
        raise ModelError(where, value, "must be silu", "use a model of a supported architecture")


def checked_spec(spec: ModelSpec, where: str) -> ModelSpec:
    """The spec with whole attention; ModelError if its heads cannot be rotated.

    A sliding window is the architecture's, which bounds what a request may reach.
    """
    if spec.head_dim % 2:
        raise ModelError(
            f"{where}: head_dim", spec.head_dim, "must be even for the rotary embedding", "check the config.json"
        )
    return spec.without_windows
