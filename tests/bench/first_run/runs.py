"""Runs of Mixtral-8x7B's shape: every order on few layers, the whole model, and transformers' offload."""

import gzip
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import msgspec

from executor.bench import Bench, BenchOptions, BenchRun
from executor.job.machine import AcceleratorOptions
from hrm.errors import HrmError
from hrm.policy import ScheduleName
from hrm.policy_file import PolicyFile, load_policy_file, policy_file_of, save_policy_file
from hrm.profiling.environment import available_ram_bytes
from hrm.search import Space, search
from hrm.trace import Trace, write_chrome_trace
from tests.bench.first_run.figures import Figures, latest
from tests.bench.first_run.machine import PIECE_BYTES, ramp
from tests.bench.first_run.setting import CAP, POLICY, TRACE, RunSetting
from tests.bench.suite.schedules import Machine, machine_of

TRACE_SPANS: Final = 30_000
TRACE_STEPS: Final = 2
KERNELS: Final = 30  # of a profile
# FlexGen's order stands for S3 and S4 under one policy; DeepSpeed's stages whole layers and may need other memory.
ORDERS: Final = (ScheduleName.FLEXGEN, ScheduleName.FASTDECODE, ScheduleName.DEEPSPEED)
SLOWER: Final = 1.3  # than predicted, before a run is held to be too long to begin
BATCHES: Final = (512, 1024)  # of transformers


def plan(setting: RunSetting) -> tuple[Machine, RunSetting]:
    """What is planned for, with the memory that was found to be there; torch is held to the cap on the card's."""
    known = latest(setting.folder)
    free, there = known.get("gpu", {}).get("free_bytes"), int(known["host touched"]["bytes"])
    if available_ram_bytes() < there:  # which a virtual machine has to be asked for again
        ramp(there, PIECE_BYTES[setting.suite.scale.name], lambda: setting.suite.left_s() / 2)
    suite = setting.planned_with(there, free)
    if not suite.emulated:  # as the other side is, which has no other cap
        import torch

        total = torch.cuda.get_device_properties(suite.accelerator).total_memory
        share = suite.scale.gpu_memory_bytes[CAP] / total
        torch.cuda.set_per_process_memory_fraction(share, suite.accelerator)
    return machine_of(suite, CAP), replace(setting, suite=suite)


def orders(setting: RunSetting, figures: Figures) -> None:
    """The whole model's policy on few layers: CGOPipe over all tokens, other orders over a few."""
    machine, setting = plan(setting)
    spec, profile, workload = machine.spec, machine.profile, setting.suite.scale.workload
    best = search(Space(spec, profile, workload, dtype=profile.default_dtype)).require()
    policy_file = policy_file_of(best, spec, profile, workload)
    save_policy_file(setting.folder / POLICY, policy_file)
    figures.put(
        "plan",
        {
            "layers": spec.num_layers,
            "policy": best.policy,
            "paper_tuple": best.paper_tuple,
            "predicted_tokens_per_s": best.tokens_per_s,
            "predicted_s": best.seconds,
            "limited_by": best.limits.decode.cause.value,
        },
    )
    checksums: dict[str, list[int]] = {}
    few = setting.suite.scale.few_tokens
    with _few(setting, policy_file) as bench, bench.start(ScheduleName.CGOPIPE, max_spans=TRACE_SPANS) as run:
        figures.put("load of few layers", {"s": run.load_s})
        run.repeat()
        measured(setting, figures, "few layers: cgopipe", run)
        _write_trace(setting.folder / TRACE, run)
        short = run.under(ScheduleName.CGOPIPE, gen_len=few)
        for order in (ScheduleName.CGOPIPE, *ORDERS):
            name = f"few layers, {few} tokens: {order.value}"
            try:
                other = short if order is ScheduleName.CGOPIPE else run.under(order, gen_len=few)
            except HrmError as error:
                figures.leave_out(name, str(error))
                continue
            other.repeat()
            checksums[order.value] = measured(setting, figures, name, other)["tokens_crc32"]
        sums = {tuple(each) for each in checksums.values()}
        agree = len(sums) == 1 and len(next(iter(sums))) == 1
        figures.gate("orders agree", is_open=agree, told=f"checksums {checksums}")
        _profile_kernels(setting, figures, run)  # last: whatever it does, all else is written


def _profile_kernels(setting: RunSetting, figures: Figures, run: BenchRun) -> None:
    """The kernels of a prefill and a decode step that take the GPU the longest, by torch's own profiler."""
    name = "kernels of few layers, 2 tokens"
    if setting.suite.emulated:
        figures.leave_out(name, "emulated")
        return
    from torch.profiler import ProfilerActivity, profile

    short = run.under(ScheduleName.CGOPIPE, gen_len=2)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        short.repeat()
    longest = sorted(seen.key_averages(), key=lambda one: -one.device_time_total)[:KERNELS]
    told = [{"name": one.key[:120], "count": one.count, "s": one.device_time_total / 1e6} for one in longest]
    if told:
        figures.put(name, told)
    else:
        figures.leave_out(name, "the profiler saw none")


def whole(setting: RunSetting, figures: Figures) -> None:
    """All layers that the host holds under CGOPipe, then FlexGen's order in the same memory."""
    machine, setting = plan(setting)
    policy_file = load_policy_file(setting.folder / POLICY)
    layers = min(machine.spec.num_layers, policy_file.model.num_layers)  # with less memory than it was solved for
    options = BenchOptions(
        model=policy_file.model,
        policy=policy_file,
        num_layers=layers,
        accelerator=_accelerator(setting),
        max_prompt_len=setting.suite.scale.workload.max_prompt_len,
    )
    with Bench(options, tell=_tell(figures)) as bench, bench.start(ScheduleName.CGOPIPE) as run:
        figures.put("load of all layers", {"s": run.load_s, "layers": layers})
        predicted_s = bench.predicted.seconds
        if setting.suite.left_s() < SLOWER * predicted_s:
            figures.leave_out("all layers: cgopipe", f"needs about {predicted_s:.0f} s")
            return
        run.repeat()
        measured(setting, figures, "all layers: cgopipe", run)
        order, few = ScheduleName.FLEXGEN, setting.suite.scale.few_tokens
        seconds = bench.estimate(replace(run.policy, schedule=order), gen_len=few).seconds
        name = f"all layers, {few} tokens: {order.value}"
        if setting.suite.left_s() < SLOWER * seconds:
            figures.leave_out(name, f"needs about {seconds:.0f} s")
            return
        other = run.under(order, gen_len=few)
        other.repeat()
        measured(setting, figures, name, other)


def s4(setting: RunSetting, figures: Figures) -> None:
    """FlexGen's order with attention on the GPU under the best policy of its own, on few layers."""
    machine, setting = plan(setting)
    spec, profile, workload = machine.spec, machine.profile, setting.suite.scale.workload
    space = Space(spec, profile, workload, dtype=profile.default_dtype, schedule=ScheduleName.FLEXGEN)
    best = search(space).require()
    with (
        _few(setting, policy_file_of(best, spec, profile, workload)) as bench,
        bench.start(ScheduleName.FLEXGEN) as run,
    ):
        run.repeat()
        measured(setting, figures, "few layers: S4", run)


def transformers(setting: RunSetting, figures: Figures) -> None:
    """transformers with accelerate's offload on as many layers, and as large a share of them on the GPU."""
    from tests.bench.suite.offload import OtherSide, Point

    machine, setting = plan(setting)
    few, cap = setting.few_layers, setting.suite.scale.gpu_memory_bytes[CAP]
    side = OtherSide(setting.suite, few, machine.profile, cap)
    figures.put("transformers", {"weights": side.weights, "build_s": side.build_s, "layers": few.num_layers})
    scale, found = setting.suite.scale, list[Point]()

    def point(batch_size: int, steps: int, resident: int) -> Point | None:
        made = side.point(batch_size, "dynamic", steps, resident)
        if made is not None:
            told = {**made.to_json(scale.workload), "resident_share": resident / few.num_layers}
            figures.put(f"few layers: transformers, batch of {batch_size}, {resident} resident", told)
            found.append(made)
        return made

    for size in BATCHES if scale.name == "full" else (scale.first_batch, scale.last_batch):
        if found and setting.suite.left_s() < 3 * (found[-1].prefill_s + 2 * found[-1].step_s.median):
            figures.leave_out(f"few layers: transformers, batch of {size}", "no time is left")
            break
        if point(size, 2, 0) is None:
            break
    if not found:
        figures.leave_out("few layers: transformers", "no batch fits")
        return
    best = max(found, key=lambda one: one.tokens_per_s(scale.workload.gen_len))
    # As many layers as would fit the card beside the batch, of the whole model's: the same share of few.
    room = (cap - best.peak_bytes) / side.layer_bytes / machine.spec.num_layers
    resident = max(0, min(few.num_layers, round(room * few.num_layers)))
    if resident:
        point(best.batch_size, 2, resident)


def measured(setting: RunSetting, figures: Figures, name: str, run: BenchRun) -> dict[str, Any]:
    """Put down a run's row, and what the card's memory holds besides."""
    row: dict[str, Any] = run.row().to_json()
    memory = row["validation"].pop("memory", None)
    kinds = {key: row["validation"][key] for key in row["validation"]}
    told = {
        **row,
        "validation": kinds,
        "memory": memory,
        "policy": msgspec.to_builtins(run.policy),
        "h2d_bytes_per_s": run.bench.policy_file.profile.h2d.bandwidth_bytes_per_s.at(),
        "library_bytes": run.library_bytes,
        **_card_memory(setting),
    }
    figures.put(name, told)
    return told


def _card_memory(setting: RunSetting) -> dict[str, int]:
    """What the driver counts as used and what torch holds of it: the rest is the context and its kernels."""
    if setting.suite.emulated:
        return {}
    import torch

    free, total = torch.cuda.mem_get_info(setting.suite.accelerator)
    reserved = torch.cuda.max_memory_reserved(setting.suite.accelerator)
    allocated = torch.cuda.max_memory_allocated(setting.suite.accelerator)
    return {"card_used_bytes": total - free, "most_reserved_bytes": reserved, "most_allocated_bytes": allocated}


def _few(setting: RunSetting, policy_file: PolicyFile) -> Bench:
    """A plan for the whole model on few of its layers."""
    options = BenchOptions(
        model=policy_file.model,
        policy=policy_file,
        num_layers=setting.few_layers.num_layers,
        accelerator=_accelerator(setting),
        max_prompt_len=setting.suite.scale.workload.max_prompt_len,
    )
    return Bench(options, tell=print)


def _accelerator(setting: RunSetting) -> AcceleratorOptions:
    return AcceleratorOptions(
        name=setting.suite.accelerator, gpu_memory_bytes=setting.suite.scale.gpu_memory_bytes[CAP]
    )


def _tell(figures: Figures) -> Any:
    return lambda line: figures.put("notice", line)


def _write_trace(path: Path, run: BenchRun) -> None:
    """The first steps as a Chrome trace, packed."""
    spans = tuple(span for span in run.spans if span.id.step < TRACE_STEPS)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "trace.json"
        write_chrome_trace(plain, measured=Trace(spans))
        with plain.open("rb") as source, gzip.open(path, "wb") as target:
            shutil.copyfileobj(source, target)
