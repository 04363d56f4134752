"""CGOPipe against the other schedules, each under its own best policy and all under CGOPipe's.

The paper does both: its main results let each system choose its batch sizes, and its ablation runs
FlexGen under MoE-Lightning's policy (arXiv 2411.11217, §5). A policy of its own is the fair
comparison of what a user gets, and generous here: it comes from our search, not from their own
planners. It is made on a few of the model's layers, as loading all of them takes a minute for each
schedule; CGOPipe is run on all of them, too. The same policy tells what the order of tasks alone is
worth. There, S3 and S4 are one order, as the policy says where attention runs; so FlexGen's order
stands for both.
"""

import gc
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import msgspec

from executor.bench import Bench, BenchOptions, BenchRun
from executor.job.machine import AcceleratorOptions
from hrm.estimate import Estimate
from hrm.formats import FORMATS
from hrm.hardware import HardwareProfile
from hrm.machines import load_profile, with_memory
from hrm.model_spec import ModelSpec
from hrm.policy import ScheduleName
from hrm.policy_file import policy_file_of
from hrm.profiling.environment import available_ram_bytes
from hrm.profiling.pinned import keeping
from hrm.search import Space, search
from tests.bench.suite.record import Record
from tests.bench.suite.setting import CAPS, Setting

OWN: Final = "own policy"
FEW: Final = "own policy, few layers"
SAME: Final = "CGOPipe's policy"
# By what they tell: the baselines of the paper's claims first.
BASELINES: Final = (ScheduleName.FLEXGEN, ScheduleName.FLEXGEN_C, ScheduleName.FASTDECODE, ScheduleName.DEEPSPEED)
ORDERS: Final = {f"{SAME}: {order.value}": order for order in ScheduleName if order is not ScheduleName.FLEXGEN_C}
PLANNED_SHARE: Final = 0.9  # of the host's free memory: what is pinned cannot give way
WEIGHT_SHARE: Final = 0.8  # of both levels that weights may take, so that caches have room
WARM_UP_REQUESTS: Final = 64
LOAD_BYTES_PER_S: Final = 1.2e9  # until the first load has told: fresh memory touched and pinned
SLOWER: Final = 1.3  # than predicted, before a run is held to be too long to begin


@dataclass(frozen=True, slots=True)
class Machine:
    """What is planned for: the measured profile under the caps, and the model's largest part."""

    profile: HardwareProfile
    spec: ModelSpec
    options: AcceleratorOptions


def machine_of(setting: Setting, cap: str) -> Machine:
    """The machine under a cap; ProfileError if it was not profiled."""
    scale = setting.scale
    gpu_bytes = scale.gpu_memory_bytes[cap]
    measured = load_profile(setting.profile_path)
    host = PLANNED_SHARE * available_ram_bytes()
    profile = with_memory(
        measured,
        gpu_memory_bytes=min(gpu_bytes, measured.top.capacity_bytes.value),
        cpu_memory_bytes=min(host, scale.host_memory_bytes or host),
    )
    spec, dtype = scale.spec, profile.default_dtype
    room = WEIGHT_SHARE * (profile.host.usable_bytes + profile.top.usable_bytes)
    layers = spec.num_layers
    while layers > 1 and spec.with_layers(spec.layers[:layers]).total_layer_bytes(FORMATS[dtype]) > room:
        layers -= 1
    options = AcceleratorOptions(name=setting.accelerator, gpu_memory_bytes=gpu_bytes)
    return Machine(profile, spec.with_layers(spec.layers[:layers]), options)


def compare(setting: Setting, cap: str) -> None:
    """Every schedule on the largest part of the model that the host holds, under a cap."""
    record = Record(setting, f"mixtral-{cap}")
    if record.complete:
        return
    machine = machine_of(setting, cap)
    whole, few = machine.spec.num_layers, min(setting.scale.few_layers, machine.spec.num_layers)
    record.put("model", {"name": machine.spec.name, "num_layers": whole, "few_layers": few})
    record.put("gpu_memory_bytes", machine.options.gpu_memory_bytes)
    orders = ORDERS if cap == CAPS[0] else {}
    jobs = [Job(f"{OWN}: {ScheduleName.CGOPIPE.value}", ScheduleName.CGOPIPE, whole, orders)]
    jobs += [Job(f"{FEW}: {schedule.value}", schedule, few) for schedule in (ScheduleName.CGOPIPE, *BASELINES)]
    with keeping():
        for job in jobs:
            if {job.name, *job.orders} <= record.figures.keys():
                continue
            try:
                _under_its_own(setting, record, machine, job)
            except Exception as error:  # noqa: BLE001 - the others can still be measured
                traceback.print_exc()
                print(getattr(error, "chart", ""))
                record.leave_out(job.name, f"{type(error).__name__}: {error}")
            gc.collect()  # the next one needs the memory
    record.finish()


@dataclass(frozen=True, slots=True)
class Job:
    """A schedule under its best policy for the whole model, on so many layers, and other orders under the same one."""

    name: str
    schedule: ScheduleName
    num_layers: int
    orders: Mapping[str, ScheduleName] = field(default_factory=dict[str, ScheduleName])


def _under_its_own(setting: Setting, record: Record, machine: Machine, job: Job) -> None:
    """Measure a job; the other orders over a few tokens: prefill is the same in all."""
    spec, profile, workload, name = machine.spec, machine.profile, setting.scale.workload, job.name
    dtype, few = profile.default_dtype, setting.scale.few_tokens
    best = search(Space(spec, profile, workload, dtype=dtype, schedule=job.schedule)).require()
    share = job.num_layers / spec.num_layers
    loads_s: dict[str, float] = record.figures.get("load_s", {})
    load_s = share * max(loads_s.values(), default=spec.parameters * 2 / LOAD_BYTES_PER_S)
    seconds = share * best.seconds
    if not _time_for(setting, record, name, load_s + SLOWER * seconds):
        return
    print(
        f"  {name}: about {load_s:.0f} s to load, then a batch of {best.policy.batch_size}, "
        f"{seconds:.0f} s as predicted",
        flush=True,
    )
    _reset_allocator_peak(setting)
    options = BenchOptions(
        model=spec,
        policy=policy_file_of(best, spec, profile, workload),
        num_layers=job.num_layers,
        accelerator=machine.options,
        max_prompt_len=workload.max_prompt_len,
    )
    with Bench(options, tell=print) as bench, bench.start(job.schedule) as loaded:
        record.put("load_s", {**loads_s, name: loaded.load_s})
        print(f"  {name}: loaded in {loaded.load_s:.0f} s", flush=True)
        # Kernels are chosen, clocks rise.
        loaded.repeat(gen_len=2, num_requests=min(WARM_UP_REQUESTS, best.policy.micro_batch_size))
        run = loaded.under(job.schedule)
        if name not in record.figures:
            _measure(setting, record, run, name, bench.predicted)
        for other, order in job.orders.items():
            if other in record.figures:
                continue
            predicted = bench.estimate(replace(run.policy, schedule=order), gen_len=few)
            if _time_for(setting, record, other, SLOWER * predicted.seconds):
                _measure(setting, record, run.under(order, gen_len=few), other, predicted)


def _time_for(setting: Setting, record: Record, name: str, seconds: float) -> bool:
    """Whether so many seconds are left; if not, that is recorded."""
    left_s = setting.left_s()
    if left_s < seconds:
        record.leave_out(name, f"needs about {seconds:.0f} s, {max(left_s, 0):.0f} s are left")
    return left_s >= seconds


def _measure(setting: Setting, record: Record, run: BenchRun, name: str, predicted: Estimate) -> None:
    """One repeat of a loaded run; its decode steps are the samples."""
    run.repeat()
    row = run.row()
    link = run.bench.policy_file.profile.h2d
    record.put(
        name,
        {
            "policy": msgspec.to_builtins(run.policy),
            "paper_tuple": predicted.paper_tuple,
            "prompt_lengths": _lengths(run),
            "bottleneck": predicted.limits.decode.cause.value,
            "h2d_bytes_per_s": link.bandwidth_bytes_per_s.at(),
            "allocator_peak_bytes": _allocator_peak(setting),
            "library_bytes": run.library_bytes,
            "row": row.to_json(),
        },
    )
    print(
        f"  {name}: {row.tokens_per_s:.4g} tokens/s, {row.predicted_tokens_per_s:.4g} predicted; "
        f"decode {row.decode_tokens_per_s:.4g}, step {row.decode_step_s.median:.3g} s",
        flush=True,
    )


def _lengths(run: BenchRun) -> dict[str, float]:
    lengths = [len(request.prompt) for request in run.bench.requests()]
    return {"mean": sum(lengths) / len(lengths), "max": max(lengths), "requests": len(lengths)}


def _reset_allocator_peak(setting: Setting) -> None:
    if not setting.emulated:
        import torch

        with torch.cuda.device(setting.accelerator):
            torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(setting.accelerator)


def _allocator_peak(setting: Setting) -> int | None:
    """What torch's allocator held on the card at most; None without one."""
    if setting.emulated:
        return None
    import torch

    return torch.cuda.max_memory_allocated(setting.accelerator)
