"""One GPU that does all that several do at once: a bound on every way in which they could share a model."""

from dataclasses import replace

from hrm.estimate import Estimate
from hrm.hardware import MemoryLevel
from hrm.latency import NO_LIMITS
from hrm.search.bound import FEW_REGIONS, NO_BOUND, Bound, Bounding, greatest
from hrm.search.space import Space


def bound_at_once(space: Space, best: Estimate | None, known_tokens_per_s: float) -> Bound:
    """One on all ways in which equal GPUs may share the model, going by the best policy that is known.

    Of unequal GPUs, and with limits on waiting times, there is none.
    """
    if space.profile.gpus or space.limits != NO_LIMITS:
        return NO_BOUND
    whole = space_at_once(space)
    spaces = [*whole.of_pinning(), *whole.in_parts(best and best.policy)]
    return greatest(Bounding(one).go_on(known_tokens_per_s, FEW_REGIONS) for one in spaces)


def space_at_once(space: Space) -> Space:
    """The space of a machine whose only GPU has what all of the space's equal GPUs have together.

    Whatever ranks or stages do in a time, it does in no longer: it reads a weight once for all of their requests, has
    no sums to exchange, and holds no more in either memory. As each of theirs waits for launches and transfers of its
    own, so many of its own take no longer than one of them.
    """
    profile = space.profile
    count = profile.num_gpus
    lanes = profile.lane_threads
    return replace(
        space,
        profile=replace(
            profile,
            name=f"{profile.name}, at once",
            num_gpus=1,
            levels=tuple(_sooner(level, count) for level in profile.levels),
            links=tuple(
                replace(link, latency_s=link.latency_s.times(1 / count))
                for link in profile.links
                if link.kind != "peer"
            ),
            lane_threads=lanes and replace(lanes, task_s=lanes.task_s.times(1 / count)),
        ),
        parallelism=None,
        expert_division=None,
    )


def _sooner(level: MemoryLevel, count: int) -> MemoryLevel:
    processor = level.processor
    request_s = processor.attention_request_s
    return replace(
        level,
        processor=replace(
            processor,
            launch_latency_s=processor.launch_latency_s.times(1 / count),
            attention_request_s=None if request_s is None else request_s.times(1 / count),
        ),
    )
