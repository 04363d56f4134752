"""What a search returns: the outcome, the policy with its estimate, and how it was found."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from hrm.errors import PolicyError
from hrm.estimate import Estimate
from hrm.layers import ExpertDivision
from hrm.policy import Parallelism, Policy

OPTIMAL_GAP: Final = 0.01  # a policy is called optimal if no other can be better by more


class Outcome(Enum):
    """How a search ended; the value says it in words."""

    OPTIMAL = "optimal"
    BEST_FOUND = "the best that was found"
    INTERRUPTED = "interrupted: the best of the policies tried so far"
    INFEASIBLE = "no policy fits, even with one request at a time"
    TOO_SLOW = "policies fit, but none answers within the limits on waiting times"
    NO_BETTER = "no policy is faster than the one that is known"


@dataclass(frozen=True, slots=True)
class Way:
    """How several GPUs could divide the work, and the best policy so that was found; None if none was.

    `obstacle` says why the model cannot be divided like that; it is empty if it can. `gpus` are the
    numbers of the only ones that would be used; all are if it is empty. `expert_division` is that of
    tensor parallelism. A way of which a bound shows that it cannot be chosen is not searched, nor are kinds of its
    policies: no policy so exceeds `at_most_tokens_per_s` then, which is 0 for ways that were searched whole.
    """

    parallelism: Parallelism
    best: Estimate | None
    obstacle: str = ""
    gpus: tuple[int, ...] = ()
    expert_division: ExpertDivision = ExpertDivision.INNER
    at_most_tokens_per_s: float = 0.0

    def is_of(self, policy: Policy) -> bool:
        """Whether a policy shares the work like that."""
        return (self.parallelism, self.expert_division, self.gpus) == (
            policy.parallelism,
            policy.expert_division,
            policy.gpus,
        )

    @property
    def words(self) -> str:
        """How the work is shared, for people."""
        whole = f", {self.expert_division.words}" if self.expert_division is ExpertDivision.WHOLE else ""
        return f"{self.parallelism.value} parallel{whole}"


def no_advice() -> tuple[str, str]:
    """Where there is nothing to change."""
    return "", ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """The best policy (`best`) and what is next to it; `best` is None if nothing fits or is better than what is known.

    `solver` is the name of what searched, and `evaluates` says in words what `evaluations` count.
    `greatest_tokens_per_s` is the greatest closed-form throughput that was found. No policy of the
    whole space can have more than `bound_tokens_per_s`, neither in closed form nor simulated, which is infinite if
    no bound was asked for; `hrm.search.bound` looked at so many `regions` to show it. `simulated` policies were
    simulated.
    `ways` are those of dividing the work between several GPUs, the chosen one among them; for a
    single GPU there are none. Where nothing fits, `advice` works out what is lacking and what to
    change; where nothing is better, it says than what.
    """

    solver: str
    evaluates: str
    outcome: Outcome
    best: Estimate | None
    runner_ups: tuple[Estimate, ...]
    greatest_tokens_per_s: float
    bound_tokens_per_s: float
    evaluations: int
    regions: int
    seconds: float
    simulated: int
    advice: Callable[[], tuple[str, str]] = field(default=no_advice, compare=False)
    ways: tuple[Way, ...] = ()

    @property
    def gap(self) -> float:
        """By what share the chosen policy may lie below the best of the space, at most."""
        if self.best is None:
            return 0.0
        return max(0.0, 1 - self.best.tokens_per_s / self.bound_tokens_per_s)

    @property
    def tokens_per_s(self) -> float:
        """Throughput of the best policy; 0 if there is none."""
        return 0.0 if self.best is None else self.best.tokens_per_s

    def require(self) -> Estimate:
        """The best estimate; PolicyError saying what to change if there is none."""
        if self.best is None:
            raise PolicyError("search", f"<{self.outcome.value}>", *self.advice())
        return self.best
