"""Where a host pins only a part of its memory: the better of weights pinned and weights staged."""

from collections.abc import Callable
from dataclasses import replace

from hrm.search.result import SearchResult
from hrm.search.space import Space

Solve = Callable[[Space], SearchResult]


def pinned_or_staged(solve: Solve) -> Solve:
    """`solve`, which also tries to stage weights on a machine that cannot pin all of its memory."""

    def better(space: Space) -> SearchResult:
        results = [solve(one) for one in spaces_of_pinning(space)]
        if len(results) == 1:
            return results[0]
        best, other = sorted(results, key=lambda result: result.tokens_per_s, reverse=True)
        return replace(
            best,
            evaluations=best.evaluations + other.evaluations,
            seconds=best.seconds + other.seconds,
            simulated=best.simulated + other.simulated,
            greatest_tokens_per_s=max(best.greatest_tokens_per_s, other.greatest_tokens_per_s),
        )

    return better


def spaces_of_pinning(space: Space) -> list[Space]:
    """The space, and where its host pins a part of its memory the one with weights staged."""
    profile, host = space.profile, space.profile.host
    pins_a_part = profile.has_accelerator and host.pinnable_bytes is not None
    can_stage = pins_a_part and profile.has_link(host.name, host.name, "staging")
    return [space, replace(space, staging=True)] if can_stage and not space.staging else [space]
