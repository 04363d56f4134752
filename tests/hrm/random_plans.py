"""Random models, machines and workloads, and random policies that fit them.

Hosts smaller than the model, GPUs that hold all of it, one GPU to eight, lanes that share cores, jobs of one
request or without end; policies over the whole of what `hrm estimate` can be told, some of them close to a
given one.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from random import Random

from hrm.formats import FORMATS, Formats
from hrm.gpus import only_gpus
from hrm.hardware import Figure, HardwareProfile, LaneThreads, Source
from hrm.layers import ExpertDivision
from hrm.machines import compose, with_memory
from hrm.memory import MemoryPlan, plan_memory
from hrm.model_spec import BUILT_IN_MODELS, ModelSpec
from hrm.parallel import obstacle_to, part_of
from hrm.policy import Parallelism, Policy, kv_tokens_for, prefix_tokens_for, spread_experts
from hrm.search import Space
from hrm.search.way import ways_of
from hrm.tasks import Device
from hrm.workload import Workload
from tests.hrm.support import random_ffn

GPUS = ("T4", "L4", "A10G", "A100-80G", "H100", "RTX-4090", "MI300X", "L40S", "V100-16G")


@dataclass(frozen=True, slots=True)
class Case:
    """What a search is asked."""

    spec: ModelSpec
    profile: HardwareProfile
    workload: Workload

    @property
    def dtype(self) -> str:
        return self.profile.default_dtype

    def __str__(self) -> str:
        top, host = self.profile.top.usable_bytes / 1e9, self.profile.host.usable_bytes / 1e9
        w = self.workload
        return (
            f"{self.spec.name} on {self.profile.name} ({top:.4g} and {host:.4g} GB), prompts "
            f"{w.prompt_len}/{w.max_prompt_len}, {w.gen_len} new, requests {w.num_requests}"
        )


@cache
def _catalog_machine(gpus: str) -> HardwareProfile:
    return compose(gpus, host="generic-server")


def random_case(rng: Random) -> Case:
    spec = BUILT_IN_MODELS[rng.choice(sorted(BUILT_IN_MODELS))]
    gpus = rng.choice([1, 1, 1, 1, 1, 2, 4, 8])
    profile = _catalog_machine(f"{gpus}x{rng.choice(GPUS)}")
    weights = spec.total_layer_bytes(FORMATS[profile.default_dtype])
    gpu = rng.choice([1.0, 1.0, 2 ** rng.uniform(-2, 2)]) * profile.top.capacity_bytes.value / gpus
    host = max(weights * 2 ** rng.uniform(-3, 3), 8e9)
    profile = with_memory(profile, gpu_memory_bytes=round(gpu), cpu_memory_bytes=round(host))
    prompt = int(2 ** rng.uniform(0, 12))
    workload = Workload(
        name="random",
        prompt_len=prompt,
        max_prompt_len=int(prompt * rng.choice([1, 1.2, 5])),
        gen_len=int(2 ** rng.uniform(0, 9)),
        num_requests=rng.choice([None, None, int(2 ** rng.uniform(0, 17))]),
    )
    if rng.random() < 0.2:
        cores = profile.top.processor.cores + profile.host.processor.cores
        a_task = Figure(value=10 ** rng.uniform(-5, -3), source=Source.ASSUMED)
        profile = replace(profile, lane_threads=LaneThreads(cores=cores, task_s=a_task))
    return Case(spec, profile, workload)


def random_policies(
    rng: Random, case: Case, near: Policy | None, *, count: int, fewer_gpus: bool = False
) -> Iterator[Policy]:
    """Up to so many policies that fit; most of them close to `near`, if that is given, and some of `fewer_gpus`."""
    found, several = 0, case.profile.num_gpus
    for _ in range(6 * count):
        if found == count:
            return
        close = near if near is not None and rng.random() < 0.6 else None
        if close is not None:
            gpus = close.gpus
        else:
            gpus = tuple(range(rng.randrange(1, several))) if fewer_gpus and several > 1 and rng.random() < 0.3 else ()
        own = replace(case, profile=only_gpus(case.profile, gpus)) if gpus else case
        policy = _any(rng, own) if close is None else _changed(rng, own, close)
        policy = None if policy is None else _with_residents(rng, own, policy)
        if policy is not None:
            found += 1
            yield replace(policy, gpus=gpus)


def _any(rng: Random, case: Case) -> Policy | None:
    number = int(2 ** rng.uniform(0, 8))
    share = rng.choice([0.0, 1.0, rng.random()])
    gpus = case.profile.num_gpus
    ways = [
        (way, division)
        for way, division in ways_of(Space(case.spec, case.profile, case.workload))
        if not obstacle_to(way, case.spec, gpus, division)
    ]
    if not ways:
        return None
    return _policy(
        case,
        size=int(2 ** rng.uniform(0, 14)),
        number=number,
        on_gpu=round(share * number),
        attention=rng.choice(list(Device)),
        **random_ffn(rng),
        dense=rng.random() < 0.7,
        chunk=int(2 ** rng.uniform(0, 17)),
        way=rng.choice(ways),
    )


def _changed(rng: Random, case: Case, near: Policy) -> Policy | None:
    def about(value: int, spread: float) -> int:
        return max(1, round(value * math.exp(rng.gauss(0, spread))))

    def other(device: Device) -> Device:
        return rng.choice(list(Device)) if rng.random() < 0.1 else device

    ffn = other(near.ffn)
    number = about(near.num_micro_batches, 0.3)
    share = near.kv_share_on_gpu + rng.choice([0, 0, rng.gauss(0, 0.1)])
    return _policy(
        case,
        size=about(near.micro_batch_size, 0.15),
        number=number,
        on_gpu=min(max(round(share * number), 0), number),
        attention=other(near.attention),
        ffn=ffn,
        prefill_ffn=other(near.prefill_ffn) if ffn is Device.CPU else ffn,
        dense=near.resident_dense != (rng.random() < 0.1),
        chunk=about(near.prefill_chunk_tokens, rng.choice([0.0, 0.5])),
        way=(near.parallelism, near.expert_division),
    )


def _policy(
    case: Case,
    *,
    size: int,
    number: int,
    on_gpu: int,
    attention: Device,
    ffn: Device,
    prefill_ffn: Device,
    dense: bool,
    chunk: int,
    way: tuple[Parallelism, ExpertDivision],
) -> Policy | None:
    w = case.workload
    if w.num_requests is not None and size > w.num_requests:
        return None
    batch = size * number if w.num_requests is None else max(min(size * number, w.num_requests), 1)
    number = -(-batch // size)
    on_gpu = min(on_gpu, number)
    parallelism, division = way
    part, _ = part_of(case.spec, case.profile, parallelism, division)
    return Policy(
        batch_size=batch,
        micro_batch_size=size,
        attention=attention,
        ffn=ffn,
        prefill_ffn=prefill_ffn,
        resident_experts=(0,) * part.num_layers,
        resident_dense=dense,
        gpu_kv_micro_batches=on_gpu,
        kv_tokens_per_micro_batch=int(kv_tokens_for(size, w.mean_context_len, w.max_context_len)),
        prefill_chunk_tokens=chunk,
        prefix_buffer_tokens=int(
            prefix_tokens_for(
                case.spec,
                Formats.of(case.dtype),
                w.max_prompt_len,
                chunk,
                cpu_attention=int(attention is Device.CPU and on_gpu < number),
            )
        ),
        parallelism=parallelism,
        expert_division=division,
        dtype=case.dtype,
    )


def _with_residents(rng: Random, case: Case, policy: Policy) -> Policy | None:
    """The policy with as many residents as fit, or with any number of them; None if it does not.

    They are spread evenly, or now and then over a few of the layers only.
    """
    part, profile = part_of(case.spec, case.profile, policy.parallelism, policy.expert_division)
    everything = part.num_expert_layers * part.num_experts
    layers = rng.sample(range(part.num_expert_layers), part.num_expert_layers)
    evenly = rng.random() < 0.8

    def having(total: int) -> Policy:
        if evenly:
            return replace(policy, resident_experts=spread_experts(part, total))
        counts = [0] * part.num_expert_layers
        for position, layer in enumerate(layers):
            counts[layer] = min(max(total - position * part.num_experts, 0), part.num_experts)
        shuffled = iter(counts)
        each = (next(shuffled) if layer.has_experts else 0 for layer in part.layers)
        return replace(policy, resident_experts=tuple(each))

    def planned(total: int) -> MemoryPlan:
        return plan_memory(part, having(total), profile)  # as of all parts, which are alike

    def fits(total: int) -> bool:
        return planned(total).fits

    if rng.random() < 0.3:
        total = rng.randint(0, everything)
        return having(total) if fits(total) else None
    least_on_gpu, least_on_host = planned(0), planned(everything)
    if least_on_gpu.gpu.lacking_bytes or least_on_host.cpu.lacking_bytes:
        return None
    # The more are resident the more of the GPU is full, and the less of the host.
    low, high = (everything, everything) if least_on_host.fits else (0, everything)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if planned(middle).gpu.lacking_bytes else (middle, high)
    return having(low) if fits(low) else None
