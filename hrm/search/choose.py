"""The choice among the best policies of every kind: by simulation, which sees their bubbles."""

from dataclasses import dataclass
from typing import Final, Protocol

from hrm.estimate import Estimate, estimate
from hrm.policy import Policy
from hrm.search.space import Space

MAX_SIMULATED: Final = 16
TIE: Final = 1e-3  # of policies that differ by no more, the one that takes less memory is chosen


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
        """The kind's best, best first, each of another form; what is not above may lack."""
        ...


@dataclass(frozen=True, slots=True)
class Choice:
    """Simulated policies, best first, and the greatest closed form that was found.

    `overshoot` is as in `SearchResult`.
    """

    ranked: tuple[Estimate, ...]
    greatest_tokens_per_s: float
    overshoot: tuple[float, float] = (1.0, 1.0)


def choose(space: Space, kinds: list[KindSolver], *, runner_ups: int) -> Choice:
    """Simulate the best candidates until none that is left can do better by its closed form.

    A kind is solved only when its turn comes, and the best of every kind is simulated before a
    second one of any: a policy with a lower closed form may have fewer bubbles. Then as many more
    are simulated as make runner-ups.
    """
    simulated: dict[Policy, Estimate] = {}
    unsolved = dict(enumerate(kinds))
    waiting: list[tuple[int, Candidate]] = []  # with their rank in their kind
    greatest = 0.0
    missed: list[tuple[float, float]] = [(1.0, 1.0)]

    def best() -> float:
        return max((predicted.tokens_per_s for predicted in simulated.values()), default=0.0)

    def solve(index: int, above: float) -> None:
        nonlocal greatest
        found = unsolved.pop(index).solve(above)
        waiting.extend(enumerate(found))
        greatest = max([greatest, *(candidate.tokens_per_s for candidate in found)])

    def simulate(chosen: tuple[int, Candidate]) -> None:
        waiting.remove(chosen)
        policy = chosen[1].policy
        if policy in simulated:
            return
        predicted = estimate(space.spec, policy, space.profile, space.workload)
        if space.limits.are_met(predicted.latency):
            simulated[policy] = predicted
        else:
            missed.append(space.limits.overshoot(predicted.latency))

    while len(simulated) < MAX_SIMULATED:
        enough = best() * (1 + TIE)
        ceilings = {index: kind.ceiling() for index, kind in unsolved.items()}
        index = max(ceilings, key=ceilings.__getitem__, default=None)
        promising = [other for other in waiting if other[1].tokens_per_s > enough]
        first = max(promising, key=lambda other: (-other[0], other[1].tokens_per_s), default=None)
        if (
            index is not None
            and ceilings[index] > enough
            and (first is None or first[0] > 0 or ceilings[index] > first[1].tokens_per_s)
        ):
            solve(index, best())
        elif first is not None:
            simulate(first)
        else:
            break
    wanted = min(runner_ups + 1, MAX_SIMULATED)
    if simulated:
        for index in sorted(unsolved, key=lambda index: -unsolved[index].ceiling()):
            if len(simulated) + len(waiting) >= wanted:
                break
            solve(index, 0.0)
        while waiting and len(simulated) < wanted:
            simulate(max(waiting, key=lambda other: other[1].tokens_per_s))
    return Choice(
        ranked(list(simulated.values())),
        greatest,
        overshoot=(max(ttft for ttft, _ in missed), max(tpot for _, tpot in missed)),
    )


def ranked(estimates: list[Estimate]) -> tuple[Estimate, ...]:
    """Best first; of those as good as the best, the one that takes the least memory is first."""
    in_order = sorted(estimates, key=lambda predicted: -predicted.tokens_per_s)
    if not in_order:
        return ()
    enough = in_order[0].tokens_per_s * (1 - TIE)
    equals = [predicted for predicted in in_order if predicted.tokens_per_s >= enough]
    first = min(equals, key=lambda predicted: predicted.memory.planned_bytes)
    return (first, *(predicted for predicted in in_order if predicted is not first))
