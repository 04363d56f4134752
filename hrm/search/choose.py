"""The choice among the best policies of every kind: by simulation, which sees their bubbles."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from hrm.estimate import Estimate
from hrm.latency import NO_LIMITS
from hrm.policy import Policy
from hrm.search.solver import Found
from hrm.search.space import Space

MAX_SIMULATED: Final = 16
PATIENCE: Final = 8  # candidates in a row that are no better than the best are simulated, and no more
TIE: Final = 1e-3  # of policies that differ by no more, the one that takes less memory is chosen


@dataclass(frozen=True, slots=True)
class Candidate:
    """A policy with its closed-form job throughput."""

    policy: Policy
    tokens_per_s: float


class KindSolver(Protocol):
    """A solver of one kind of policies, asked only if the kind may still win."""

    @property
    def evaluations(self) -> int:
        """How many policies have been looked at."""
        ...

    def ceiling(self) -> float:
        """No policy of the kind has a higher closed-form throughput, as far as is known."""
        ...

    def solve(self, above: float) -> list[Candidate] | None:
        """The kind's best, best first, each of another form; what is not above may lack.

        None if more of the kind is to be tried first: its ceiling may now be below that of others.
        """
        ...


def choose(space: Space, kinds: Sequence[KindSolver]) -> Found:
    """Simulate the best candidates until none that is left can do better by its closed form.

    A kind is solved only when its turn comes, and the best of every kind is simulated before a
    second one of any: a policy with a lower closed form may have fewer bubbles.
    """
    choosing = _Choosing(space, kinds)
    choosing.best_of_all()
    missed = [(1.0, 1.0), *choosing.missed]
    return Found(
        ranked=ranked(list(choosing.simulated.values())),
        more=choosing.others,
        greatest_tokens_per_s=choosing.greatest,
        evaluations=sum(kind.evaluations for kind in kinds),
        simulated=len(choosing.simulated) + len(choosing.slower),
        slower=tuple(candidate.policy for _, candidate in choosing.slower),
        overshoot=(max(ttft for ttft, _ in missed), max(tpot for _, tpot in missed)),
    )


class _Choosing:
    """Kinds that are not solved yet, candidates that wait, and what has been simulated."""

    def __init__(self, space: Space, kinds: Sequence[KindSolver]) -> None:
        self.space = space
        self.unsolved = list(kinds)
        self.waiting: list[tuple[int, Candidate]] = []  # with their rank in their kind
        self.simulated: dict[Policy, Estimate] = {}
        self.slower: list[tuple[int, Candidate]] = []  # than the best that is known, by their decode alone
        self.missed: list[tuple[float, float]] = []  # limits on waiting times, by these factors
        self.greatest = 0.0

    def best_of_all(self) -> None:
        """Simulate what may be best."""
        in_vain = 0
        while len(self.simulated) + len(self.slower) < MAX_SIMULATED and in_vain < PATIENCE:
            rates = [predicted.tokens_per_s for predicted in self.simulated.values()]
            fastest = max(rates, default=0.0)
            best = max(self.space.known_tokens_per_s, fastest) if rates else 0.0
            enough = best * (1 + TIE)
            kind = max(self.unsolved, key=lambda kind: kind.ceiling(), default=None)
            promising = [other for other in self.waiting if other[1].tokens_per_s > enough]
            first = max(promising, key=lambda other: (-other[0], other[1].tokens_per_s), default=None)
            if (
                kind is not None
                and kind.ceiling() > enough
                and (first is None or first[0] > 0 or kind.ceiling() > first[1].tokens_per_s)
            ):
                self._solve(kind, best)
            elif first is not None:
                predicted = self._simulate(first, best * (1 - TIE))
                is_better = predicted is not None and predicted.tokens_per_s > fastest * (1 + TIE)
                in_vain = 0 if is_better else in_vain + 1
            else:
                break

    def others(self) -> Iterator[Estimate]:
        """Simulate the rest, the highest closed form first."""
        self.waiting += self.slower
        while self.waiting or self.unsolved:
            if not self.waiting:
                self._solve(max(self.unsolved, key=lambda kind: kind.ceiling()), 0.0)
                continue
            predicted = self._simulate(max(self.waiting, key=lambda other: other[1].tokens_per_s))
            if predicted is not None:
                yield predicted

    def _solve(self, kind: KindSolver, above: float) -> None:
        found = kind.solve(above)
        if found is None:
            return
        self.unsolved.remove(kind)
        self.waiting.extend(enumerate(found))
        self.greatest = max([self.greatest, *(candidate.tokens_per_s for candidate in found)])

    def _simulate(self, chosen: tuple[int, Candidate], above: float = 0.0) -> Estimate | None:
        """What a waiting candidate does; None if that is known or not above, or if it misses the limits."""
        self.waiting.remove(chosen)
        policy = chosen[1].policy
        if policy in self.simulated:
            return None
        # Where there are limits, it is to be known by how much they are missed.
        predicted = self.space.predicted_above(above if self.space.limits == NO_LIMITS else 0.0, policy)
        if predicted is None:
            self.slower.append(chosen)
            return None
        if not self.space.limits.are_met(predicted.latency):
            self.missed.append(self.space.limits.overshoot(predicted.latency))
            return None
        self.simulated[policy] = predicted
        return predicted


def simulated_above(
    space: Space, best_tokens_per_s: float, policies: Iterable[Policy], most: int | None = None
) -> list[Estimate]:
    """What policies do that fit and meet the limits, without those that are shown to be slower than the best is.

    The most promising are first, so that the best rules the others out, and no more than so many are looked at.
    """
    found: list[Estimate] = []
    prospects = [space.prospect(policy) for policy in policies]
    for prospect in sorted(prospects, key=lambda prospect: -prospect.at_most_tokens_per_s)[:most]:
        predicted = prospect.above(best_tokens_per_s * (1 - TIE))
        if predicted is not None and predicted.memory.fits and space.limits.are_met(predicted.latency):
            found.append(predicted)
            best_tokens_per_s = max(best_tokens_per_s, predicted.tokens_per_s)
    return found


def ranked(estimates: list[Estimate]) -> tuple[Estimate, ...]:
    """Best first; of those as good as the best, the one that takes the least memory is first."""
    in_order = sorted(estimates, key=lambda predicted: -predicted.tokens_per_s)
    if not in_order:
        return ()
    enough = in_order[0].tokens_per_s * (1 - TIE)
    equals = [predicted for predicted in in_order if predicted.tokens_per_s >= enough]
    first = min(equals, key=lambda predicted: predicted.memory.planned_bytes)
    return (first, *(predicted for predicted in in_order if predicted is not first))
