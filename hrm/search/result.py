"""What a search returns: the outcome, the policy with its estimate, and how it was found."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from hrm.errors import PolicyError
from hrm.estimate import Estimate
from hrm.policy import Parallelism


class Outcome(Enum):
    """How a search ended; the value says it in words."""

    OPTIMAL = "no policy tried has a higher closed-form throughput"
    PROVED = "no policy of the space has a higher closed-form throughput, which is proved"
    BEST_OF_TRIALS = "the best of the policies tried; nothing is proved"
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

    `greatest_tokens_per_s` is the greatest closed-form throughput of the space, as far as it is
    known, and `gap` how far the chosen policy's lies below it: more than 0 only where the
    simulation prefers a policy with fewer bubbles. `simulated` policies were simulated;
    `certified` says that of every kind left out (devices, KV placement) even the closed form is no
    higher than the chosen policy's simulated throughput. `ways` are those of dividing the work
    between several GPUs, the chosen one among them; for a single GPU there are none. `overshoot`
    are factors by which policies that were simulated and left out missed limits on waiting times.
    Where nothing fits, `advice` works out what is lacking and what to change.
    """

    solver: str
    outcome: Outcome
    best: Estimate | None
    runner_ups: tuple[Estimate, ...]
    greatest_tokens_per_s: float
    evaluations: int
    seconds: float
    gap: float
    simulated: int
    certified: bool
    overshoot: tuple[float, float] = (1.0, 1.0)
    advice: Callable[[], tuple[str, str]] = field(default=lambda: ("", ""), compare=False)
    ways: tuple[Way, ...] = ()

    @staticmethod
    def impossible(obstacles: str, ways: tuple[Way, ...]) -> "SearchResult":
        """The result where there is nothing to search."""
        return SearchResult(
            solver="none", outcome=Outcome.INFEASIBLE, best=None, runner_ups=(),
            greatest_tokens_per_s=0.0, evaluations=0, seconds=0.0, gap=0.0, simulated=0,
            certified=True, ways=ways, advice=lambda: (obstacles, "ask for another number of GPUs"),
        )  # fmt: skip

    @property
    def tokens_per_s(self) -> float:
        """Throughput of the best policy; 0 if there is none."""
        return 0.0 if self.best is None else self.best.tokens_per_s

    def require(self) -> Estimate:
        """The best estimate; PolicyError saying what to change if there is none."""
        if self.best is None:
            raise PolicyError("search", f"<{self.outcome.value}>", *self.advice())
        return self.best
