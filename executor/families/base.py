"""What a model family tells: its architecture by config, its tensors' names, their quirks.

D hidden, V vocab.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, final

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
    def layer_tensors(self, arch: Architecture, layer: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of a layer."""

    @abstractmethod
    def load_dense(
        self, source: WeightSource, arch: Architecture, layer: int, out: DenseWeights
    ) -> None:
        """Fill the dense part of a layer."""

    @abstractmethod
    def load_expert(
        self, source: WeightSource, arch: Architecture, layer: int, expert: int, out: ExpertWeights
    ) -> None:
        """Fill one expert of a layer."""

    @final
    def expected_tensors(self, arch: Architecture) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that a checkpoint has."""
        spec = arch.spec
        shapes: dict[str, tuple[int, ...]] = {
            self.embedding: (spec.vocab_size, spec.hidden_size),
            self.final_norm: (spec.hidden_size,),
        }
        if not spec.tied_embeddings:
            shapes[self.lm_head] = (spec.vocab_size, spec.hidden_size)
        for layer in range(spec.num_layers):
            shapes |= self.layer_tensors(arch, layer)
        return shapes

    @final
    def load_embedding(self, source: WeightSource, out_VD: Tensor) -> None:
        """Fill the token embedding."""
        source.read_into(self.embedding, out_VD)

    @final
    def load_head(
        self, source: WeightSource, arch: Architecture, final_norm_D: Tensor, lm_head_VD: Tensor
    ) -> None:
        """Fill the final norm and the LM head, from the embedding if they are tied."""
        source.read_into(self.final_norm, final_norm_D)
        source.read_into(self.embedding if arch.spec.tied_embeddings else self.lm_head, lm_head_VD)


def token_ids(config: dict[str, Any], where: str, key: str) -> tuple[int, ...]:
    """The token ids under `key`: none, one or several."""
    value = config.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise ModelError(
                f"{where}: {key}", value, "must be a token id or a list of them",
                "correct it in config.json or generation_config.json",
            )  # fmt: skip
    return tuple(ids)


def positive(config: dict[str, Any], where: str, key: str, default: float | None) -> float:
    """The positive number under `key`, or the default if the key is missing or null."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ModelError(
            f"{where}: {key}", "<missing>" if value is None else value,
            "must be a positive number", "check the config.json",
        )  # fmt: skip
    return value


def rope_theta(config: dict[str, Any], where: str, default: float) -> float:
    """The base of the rotary embedding, under `rope_parameters` or, as once, at the top.

    Raises ModelError if the embedding is scaled or partial.
    """
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if rope is None:
            continue
        kind = (
            rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
        )
        if kind != "default":
            raise ModelError(
                f"{where}: {key}", rope, "must be of type default: scaled positions are not"
                " supported", "use a model without rope scaling",
            )  # fmt: skip
        config = {**config, **rope}
    if config.get("partial_rotary_factor", 1) != 1:
        raise ModelError(
            f"{where}: partial_rotary_factor", config["partial_rotary_factor"],
            "must be 1: whole heads are rotated", "use a model of a supported architecture",
        )  # fmt: skip
    return float(positive(config, where, "rope_theta", default))


def require_silu(value: object, where: str) -> None:
    """Raise ModelError unless the experts' activation is SiLU."""
    if not isinstance(value, str) or value not in {"silu", "swish"}:
        raise ModelError(where, value, "must be silu", "use a model of a supported architecture")


def checked_spec(spec: ModelSpec, where: str) -> ModelSpec:
    """The spec itself; ModelError if its heads cannot be rotated."""
    if spec.head_dim % 2:
        raise ModelError(
            f"{where}: head_dim", spec.head_dim, "must be even for the rotary embedding",
            "check the config.json",
        )  # fmt: skip
    return spec
