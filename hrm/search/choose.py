"""The choice among the best policies of every kind: by simulation, which sees their bubbles."""

from dataclasses import dataclass
from typing import Final, Protocol

from hrm.estimate import Estimate, estimate
from hrm.policy import Policy
from hrm.search.space import Space
from hrm.search.ties import NEAR_TIE, smaller_plans

MAX_SIMULATED: Final = 8
_SMALLER: Final = 4  # of the smaller plans that may be as fast, how many are simulated

Ranked = list[tuple["Candidate", Estimate]]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A policy with its closed-form job throughput."""

    policy: Policy
    tokens_per_s: float


class KindSolver(Protocol):
    """A solver of one kind of policies, asked only if the kind may still win."""

    def ceiling(self) -> float:
        """No policy of the kind has a higher closed-form throughput, as far as is known."""
        ...

    def solve(self, above: float) -> list[Candidate]:
        """The kind's best, each of its own number of micro-batches; what is not above may lack."""
        ...


@dataclass(frozen=True, slots=True)
class Choice:
    """Simulated policies, best first, and whether none that was left out can be better.

    `overshoot` is as in `SearchResult`.
    """

    ranked: tuple[tuple[Candidate, Estimate], ...]
    greatest_tokens_per_s: float
    certified: bool
    overshoot: tuple[float, float]

    @property
    def gap(self) -> float:
        """How far the first one's closed form lies below the greatest."""
        if not self.ranked:
            return 0.0
        return max(0.0, 1 - self.ranked[0][0].tokens_per_s / self.greatest_tokens_per_s)


def choose(space: Space, kinds: list[KindSolver], *, runner_ups: int) -> Choice:
    """Simulate the best of each kind until none that is left can do better by its closed form.

    A kind is solved only when its turn comes. Then as many more are simulated as make runner-ups.
    """
    simulated: dict[Policy, tuple[Candidate, Estimate]] = {}
    solved: dict[int, list[Candidate]] = {}
    seen: set[int] = set()
    missed: list[tuple[float, float]] = [(1.0, 1.0)]

    def simulate(candidate: Candidate) -> None:
        if candidate.policy not in simulated:
            predicted = estimate(space.spec, candidate.policy, space.profile, space.workload)
            if space.limits.are_met(predicted.latency):
                simulated[candidate.policy] = candidate, predicted
            else:
                missed.append(space.limits.overshoot(predicted.latency))

    def best() -> float:
        return max((predicted.tokens_per_s for _, predicted in simulated.values()), default=0.0)

    def ceiling(index: int) -> float:
        if index in solved:
            return max((c.tokens_per_s for c in solved[index]), default=0.0)
        return kinds[index].ceiling()

    def left() -> list[int]:
        return [i for i in range(len(kinds)) if i not in seen and ceiling(i) > best()]

    while (open_kinds := left()) and len(simulated) < MAX_SIMULATED:
        index = max(open_kinds, key=ceiling)
        if index not in solved:
            solved[index] = kinds[index].solve(best())
        else:
            seen.add(index)
            simulate(solved[index][0])
    certified = not left()
    wanted = min(runner_ups + 1, MAX_SIMULATED)
    if simulated and len(simulated) < wanted:
        for index in sorted(set(range(len(kinds))) - set(solved), key=ceiling, reverse=True):
            if sum(map(len, solved.values())) >= wanted:
                break
            solved[index] = kinds[index].solve(0.0)
        others = [candidate for candidates in solved.values() for candidate in candidates]
        for candidate in sorted(others, key=lambda candidate: -candidate.tokens_per_s):
            if len(simulated) >= wanted:
                break
            simulate(candidate)
    ranked = sorted(simulated.values(), key=lambda pair: -pair[1].tokens_per_s)
    every = [candidate.tokens_per_s for candidates in solved.values() for candidate in candidates]
    return Choice(
        ranked=_smallest_first(space, ranked),
        greatest_tokens_per_s=max(every, default=0.0),
        certified=certified,
        overshoot=(max(ttft for ttft, _ in missed), max(tpot for _, tpot in missed)),
    )


def _smallest_first(space: Space, ranked: Ranked) -> tuple[tuple[Candidate, Estimate], ...]:
    """The ranking with the smallest of the plans first that are as fast as the best, nearly.

    Those are plans that were simulated, and of the best one's kind with smaller batches. Larger
    ones that are faster by a near tie only are left out.
    """
    if not ranked:
        return ()
    enough = (1 - NEAR_TIE) * ranked[0][1].tokens_per_s
    first = min(
        (pair for pair in ranked if pair[1].tokens_per_s >= enough),
        key=lambda pair: pair[0].policy.batch_size,
    )
    candidate = first[0]
    for policy, closed in smaller_plans(space, candidate.policy, candidate.tokens_per_s)[:_SMALLER]:
        predicted = estimate(space.spec, policy, space.profile, space.workload)
        if predicted.tokens_per_s >= enough and space.limits.are_met(predicted.latency):
            first = Candidate(policy, closed), predicted
            break
    slower = [pair for pair in ranked if pair[1].tokens_per_s < first[1].tokens_per_s]
    return (first, *slower)
