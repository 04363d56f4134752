"""Where a host pins only a part of its memory: the better of weights pinned and weights staged."""

from collections.abc import Callable
from dataclasses import replace

from hrm.hardware import HardwareProfile
from hrm.search.result import SearchResult
from hrm.search.space import Space

Solve = Callable[[Space], SearchResult]


def pinned_or_staged(solve: Solve) -> Solve:
    """`solve`, which also tries to stage weights on a machine that cannot pin all of its memory."""

    def better(space: Space) -> SearchResult:
        pinned = solve(space)
        if space.staging or not _pins_a_part(space.profile):
            return pinned
        staged = solve(replace(space, staging=True))
        best, other = sorted((pinned, staged), key=_tokens_per_s, reverse=True)
        greatest = max(best.greatest_tokens_per_s, other.greatest_tokens_per_s)
        closed_form = best.greatest_tokens_per_s * (1 - best.gap)
        return replace(
            best,
            evaluations=best.evaluations + other.evaluations,
            seconds=best.seconds + other.seconds,
            simulated=best.simulated + other.simulated,
            certified=best.certified and other.certified,
            greatest_tokens_per_s=greatest,
            gap=max(0.0, 1 - closed_form / greatest) if greatest else 0.0,
        )

    return better


def _pins_a_part(profile: HardwareProfile) -> bool:
    host = profile.host
    can_stage = profile.has_link(host.name, host.name, "staging")
    return profile.has_accelerator and host.pinnable_bytes is not None and can_stage


def _tokens_per_s(result: SearchResult) -> float:
    return 0.0 if result.best is None else result.best.tokens_per_s
