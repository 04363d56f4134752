"""What packing a checkpoint cost: bytes and errors, by layer."""

from dataclasses import dataclass, field
from math import exp, sqrt
from typing import Any, Final, final

from torch import Tensor

from executor.formats import Packed

_BITS: Final = 8


@dataclass(slots=True)
class Loss:
    """How far packed matrices are from what they were; errors are sums of squares over all weights."""

    matrices: int = 0
    weights: int = 0
    num_bytes: int = 0
    squared_error: float = 0.0
    squared_weights: float = 0.0

    def add(self, matrix: Tensor, packed: Packed) -> None:
        """Count a matrix, float32, and what was made of it."""
        self.matrices += 1
        self.weights += matrix.numel()
        self.num_bytes += packed.nbytes
        for rows in packed.strips():
            weights = matrix[rows]
            off = packed[rows].weights().sub_(weights)
            self.squared_error += off.square_().double().sum().item()
            self.squared_weights += weights.square().double().sum().item()

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(
            self.matrices + other.matrices,
            self.weights + other.weights,
            self.num_bytes + other.num_bytes,
            self.squared_error + other.squared_error,
            self.squared_weights + other.squared_weights,
        )

    @property
    def relative_error(self) -> float:
        """The norm of the errors by that of the weights."""
        return sqrt(self.squared_error / self.squared_weights) if self.squared_weights else 0.0

    @property
    def bits(self) -> float:
        """Of a weight, with its share of scales."""
        return _BITS * self.num_bytes / self.weights if self.weights else 0.0

    def to_json(self) -> dict[str, Any]:
        """What is told of it."""
        return {
            "matrices": self.matrices,
            "weights": self.weights,
            "bits_per_weight": self.bits,
            "relative_error": self.relative_error,
        }


@dataclass(frozen=True, slots=True)
class Perplexity:
    """The negative log probability of so many tokens, each given those before it in its text."""

    nats: float = 0.0
    tokens: int = 0

    @property
    def value(self) -> float:
        """By token."""
        return exp(self.nats / self.tokens)


@final
@dataclass(slots=True, kw_only=True)
class Report:
    """What was made of a checkpoint. `losses` are by layer and by whether the matrices are of experts.

    `method` is how the format is published; `obstacle` says why others may not read it, and is mostly empty.
    `perplexities` are those of the old checkpoint and the new one, if they were asked for.
    """

    format: str
    method: str
    obstacle: str
    bytes_before: int
    bytes_after: int
    perplexities: tuple[Perplexity, Perplexity] | None = None
    losses: dict[tuple[int, bool], Loss] = field(default_factory=dict[tuple[int, bool], Loss])

    def add(self, layer: int, matrix: Tensor, packed: Packed, *, of_expert: bool) -> None:
        """Count a matrix of a layer."""
        self.losses.setdefault((layer, of_expert), Loss()).add(matrix, packed)

    @property
    def total(self) -> Loss:
        """All that was packed."""
        return sum(self.losses.values(), start=Loss())

    def to_json(self) -> dict[str, Any]:
        """The report as --json prints it."""
        rows = [
            {"layer": layer, "experts": of_expert, **loss.to_json()}
            for (layer, of_expert), loss in sorted(self.losses.items())
        ]
        return {
            "format": self.format,
            "method": self.method,
            "only_executor_reads_it": self.obstacle or None,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "total": self.total.to_json(),
            "layers": rows,
            "perplexity": self._perplexity(),
        }

    def _perplexity(self) -> dict[str, Any] | None:
        if self.perplexities is None:
            return None
        before, after = self.perplexities
        return {"tokens": before.tokens, "before": before.value, "after": after.value}
