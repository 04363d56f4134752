"""What a search returns: the outcome, the policy with its estimate, and how it was found."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Final

from hrm.errors import PolicyError
from hrm.estimate import Estimate
from hrm.policy import Parallelism

OPTIMAL_GAP: Final = 0.01  # a policy is called optimal if no other can be better by more


class Outcome(Enum):
    """How a search ended; the value says it in words."""

    OPTIMAL = "optimal"
    BEST_FOUND = "the best that was found"
    INTERRUPTED = "interrupted: the best of the policies tried so far"
    INFEASIBLE = "no policy fits, even with one request at a time"
    TOO_SLOW = "policies fit, but none answers within the limits on waiting times"


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How several GPUs could divide the work, and the best policy so; None if there is none.

    `obstacle` says why the model cannot be divided like that; it is empty if it can.
    """

    parallelism: Parallelism
    best: Estimate | None
    obstacle: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """The best policy (`best`) and what is next to it; `best` is None if nothing fits.

    `greatest_tokens_per_s` is the greatest closed-form throughput that was found. No policy of the
    whole space can have more than `bound_tokens_per_s`, neither in closed form nor simulated;
    `hrm.search.bound` looked at so many `regions` to show it. `simulated` policies were simulated.
    `ways` are those of dividing the work between several GPUs, the chosen one among them; for a
    single GPU there are none. `overshoot` are factors by which policies that were simulated and
    left out missed limits on waiting times. Where nothing fits, `advice` works out what is lacking
    and what to change.
    """

    solver: str
    outcome: Outcome
    best: Estimate | None
    runner_ups: tuple[Estimate, ...]
    greatest_tokens_per_s: float
    bound_tokens_per_s: float = math.inf
    evaluations: int
    regions: int = 0
    seconds: float
    simulated: int
    overshoot: tuple[float, float] = (1.0, 1.0)
    advice: Callable[[], tuple[str, str]] = field(default=lambda: ("", ""), compare=False)
    ways: tuple[Way, ...] = ()

    @property
    def gap(self) -> float:
        """By what share the chosen policy may lie below the best of the space, at most."""
        if self.best is None:
            return 0.0
        return max(0.0, 1 - self.best.tokens_per_s / self.bound_tokens_per_s)

    def bounded(self, tokens_per_s: float, regions: int, seconds: float) -> "SearchResult":
        """The same with a bound over the whole space, and what follows for the outcome."""
        result = replace(
            self, bound_tokens_per_s=tokens_per_s, regions=self.regions + regions, seconds=self.seconds + seconds
        )
        if result.best is None or self.outcome is Outcome.INTERRUPTED:
            return result
        optimal = result.gap <= OPTIMAL_GAP
        return replace(result, outcome=Outcome.OPTIMAL if optimal else Outcome.BEST_FOUND)

    @staticmethod
    def impossible(obstacles: str, ways: tuple[Way, ...]) -> "SearchResult":
        """The result where there is nothing to search."""
        return SearchResult(
            solver="none",
            outcome=Outcome.INFEASIBLE,
            best=None,
            runner_ups=(),
            greatest_tokens_per_s=0.0,
            bound_tokens_per_s=0.0,
            evaluations=0,
            seconds=0.0,
            simulated=0,
            ways=ways,
            advice=lambda: (obstacles, "ask for another number of GPUs"),
        )

    @property
    def tokens_per_s(self) -> float:
        """Throughput of the best policy; 0 if there is none."""
        return 0.0 if self.best is None else self.best.tokens_per_s

    def require(self) -> Estimate:
        """The best estimate; PolicyError saying what to change if there is none."""
        if self.best is None:
            raise PolicyError("search", f"<{self.outcome.value}>", *self.advice())
        return self.best
