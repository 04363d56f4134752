"""What the regions of a bound say of given policies, on all the way from the whole space down to each policy alone.

A bound is the highest ceiling of many regions, so that one which is too low shows only where it is the highest. Here
every region on the way to a policy must have a ceiling that the policy does not exceed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from hrm.closed_form import Point, batch_seconds
from hrm.policy import Parallelism, Policy
from hrm.search import Space
from hrm.search.bound import Bounder
from hrm.search.regions import CHUNK, Regions
from hrm.search.way import space_of_part
from hrm.tasks import Device

NEARLY = 1e-9


def by_parts(space: Space, policies: Iterable[Policy]) -> list[tuple[Space, list[Policy]]]:
    """For each way to share the GPUs what a search asks of one part of the machine, and what policies are there."""
    found: dict[object, tuple[Space, list[Policy]]] = {}
    for policy in policies:
        part = space_of_part(space, policy.parallelism, policy.expert_division)
        assert part is not None, policy
        requests = part.workload.num_requests
        of_part = policy if requests is None else policy.for_batch(min(policy.batch_size, requests))
        _, others = found.setdefault((policy.parallelism, policy.expert_division), (part.holding(policy), []))
        others.append(replace(of_part, parallelism=Parallelism.TENSOR))
    return list(found.values())


def closed_form_rate(space: Space, policy: Policy) -> float:
    """Tokens a second of the whole job under a policy of the space, by the closed form."""

    def seconds(one: Policy) -> float:
        return sum(batch_seconds(space.costs, Point.of_policy(one, space.spec), space.schedule, space.workload))

    requests = space.workload.requests_or(policy.batch_size)
    full, rest = divmod(requests, policy.batch_size)
    in_all = full * seconds(policy) + (seconds(policy.for_batch(rest)) if rest else 0.0)
    return requests * space.workload.generated_tokens / in_all


def lowest_ceilings(space: Space, policies: Sequence[Policy]) -> list[float]:
    """Of each policy, which must fit, the lowest ceiling of all regions that hold it; 0 where it was cut off."""
    bounder = Bounder(space)
    regions = bounder.everything()
    on_the_way: list[Regions] = []
    under_way = reached = np.ones(len(policies), dtype=bool)
    while under_way.any():
        regions = bounder.room.tightened(regions)
        held = _held(regions, space, policies)
        reached &= held.any(axis=1) | ~under_way
        wide = ~bounder.cannot_halve(regions)
        under_way = (held & wide).any(axis=1)
        on_the_way.append(regions.take(np.flatnonzero(held.any(axis=0))))
        regions = bounder.halved(regions.take(np.flatnonzero((held & wide).any(axis=0))))
    regions, ceilings = bounder.bounded(reduce(Regions.and_also, on_the_way))
    held = _held(regions, space, policies)
    return [ceilings[of_policy].min() if whole else 0.0 for of_policy, whole in zip(held, reached, strict=True)]


def _held(regions: Regions, space: Space, policies: Sequence[Policy]) -> NDArray[np.bool_]:
    """Which regions, in columns, hold which policies, in rows."""
    layers, experts = space.spec.num_expert_layers, space.spec.num_experts
    held = np.zeros((len(policies), len(regions)), dtype=bool)
    for row, policy in zip(held, policies, strict=True):
        resident, on_gpu = sum(policy.resident_experts) / layers, policy.kv_share_on_gpu
        # With all of it resident it is one whether the rest would be computed here or there.
        ways = (
            (regions.gpu_attention, on_gpu == 1 or policy.attention is Device.GPU),
            (regions.gpu_ffn, resident == experts or policy.ffn is Device.GPU),
            (regions.gpu_prefill, resident == experts or policy.prefill_ffn is Device.GPU),
            (regions.dense, policy.resident_dense),
            (regions.one_chunk, policy.prefill_chunk_tokens >= policy.batch_size * space.workload.prompt_len),
        )
        numbers = policy.micro_batch_size, policy.num_micro_batches, on_gpu, resident, policy.prefill_chunk_tokens
        at = np.array(numbers, dtype=float)[:, None]
        inside = (regions.low <= at * (1 + NEARLY)) & (at * (1 - NEARLY) <= regions.high)
        inside[CHUNK] |= regions.one_chunk == 1
        row[:] = np.logical_and.reduce([*(way == is_so for way, is_so in ways), *inside])
    return held
