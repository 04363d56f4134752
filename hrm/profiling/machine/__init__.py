"""From benchmarks to the profile of this machine.

A profile is a list of steps, each with its share of the time, that are taken in several passes;
what a step finds is used by the next ones (a GEMM's rate is taken without the launch latency).
`cpu`, `emulated` and `cuda` say what is measured on each kind of machine, `host` what all have;
`journal` keeps finished steps.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from hrm.contract.host_kernels import HostKernels
from hrm.errors import ProfileError
from hrm.hardware import SCHEMA, HardwareProfile
from hrm.model_spec import ModelSpec
from hrm.profile_diff import figures_of
from hrm.profiling.environment import BUSY, HostFacts, Others, host_facts, software
from hrm.profiling.machine.cpu import profile_cpu
from hrm.profiling.machine.cuda import profile_cuda
from hrm.profiling.machine.emulated import EMULATED_GPU_BYTES, EMULATED_LINK_BYTES_PER_S, profile_emulated
from hrm.profiling.machine.journal import Journal, partial_path
from hrm.profiling.machine.run import Run
from hrm.profiling.machine.steps import ProfilingInterrupted, Progress, Steps
from hrm.profiling.passes import flag_noisy
from hrm.units import DTYPE_BYTES, counted

if TYPE_CHECKING:
    from hrm.profiling.gpu import AbstractGpu

__all__ = ["DTYPES", "EMULATED_LINK_BYTES_PER_S", "ProfilingInterrupted", "partial_path", "profile_machine"]

DTYPES: Final = ("bfloat16", "float16", "float32")
PASSES: Final = 7
QUICK_PART_S: Final = 0.75  # a part of a step in all passes; machines have 30 to 100 of them
FULL_PART_S: Final = 7.0
MOST_QUICK_S: Final = 53.0  # after which no pass may end; one in place of a disturbed one may fit
MOST_FULL_S: Final = 570.0
REMEDY: Final = "use --accelerator emulated or cpu, or install a CUDA build of torch"


def profile_machine(
    accelerator: str = "auto",
    *,
    gpu_memory_bytes: int | None = None,
    link_bandwidth_bytes_per_s: float | None = None,
    quick: bool = False,
    model: ModelSpec | None = None,
    dtypes: Sequence[str] = DTYPES,
    disk: Path | None = None,
    partial: Path | None = None,
    resume: bool = False,
    save: Callable[[HardwareProfile], object] | None = None,
    progress: Progress | None = None,
    command: str = "",
    budget_s: float | None = None,
    kernels: HostKernels | None = None,
) -> HardwareProfile:
    """Measure this machine, for under a minute if `quick`, else about eight; or for `budget_s`.

    Everything is measured in seven passes, fewer where they would take too long, and the spreads
    say how far they differ. A pass that others disturbed is made again if there is time.
    `accelerator` is `cuda:0`, `cuda:0,1` or `cuda:all`, `emulated`, `cpu`, or `auto` for the first
    GPU if there is one and the CPU if not. Emulated, the GPU level holds `gpu_memory_bytes` and its
    links are paced to `link_bandwidth_bytes_per_s`. GEMMs have the shapes of `model`. The first of
    `dtypes` is that of the KV cache. `disk` is the folder whose disk is measured. `kernels` compute
    on the CPU instead of torch. Finished steps are kept in the file `partial`, which is locked
    against other processes, and `resume` goes on with those that it holds. `save` is called with
    the whole profile, after which that file is removed. `progress(done_s, total_s, what)` is called
    before each step and at the end.
    Raises ProfileError if there is no such accelerator, or what was kept is of another machine or
    being written by another process, ProfilingInterrupted on Ctrl-C.
    """
    kind, indices = _resolve(accelerator)
    part_s, most_s = (QUICK_PART_S, MOST_QUICK_S) if quick else (FULL_PART_S, MOST_FULL_S)
    if budget_s is not None:
        part_s, most_s = inf, budget_s
    _check_options(kind, dtypes, gpu_memory_bytes, link_bandwidth_bytes_per_s)
    started_s, others, host = time.monotonic(), Others(), host_facts()
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    gpus = _gpus(indices)
    options = {
        "accelerator": kind if kind != "cuda" else f"cuda:{','.join(map(str, indices))}",
        "--gpu-memory": _told(gpu_memory_bytes),
        "--link-bandwidth": _told(link_bandwidth_bytes_per_s),
        "--disk": _told(disk),
        "--dtype": ", ".join(dtypes),
        "mode": "quick" if quick else "full",
        "model": repr(model) if model else "not given",
        "kernels": kernels.name if kernels else "torch",
    }
    journal = None
    if partial is not None:
        measures = options | _identity(host, gpus)
        journal = Journal(partial, measures, date=date, resume=resume)
    with closing(journal) if journal else nullcontext():
        run = Run(
            host=host,
            threads=_threads(host),
            quick=quick,
            model=model,
            dtypes=tuple(dict.fromkeys(dtypes)),
            disk=disk,
            steps=Steps(part_s, most_s, progress, journal, PASSES, watch=Others),
            kernels=kernels,
        )
        profile = flag_noisy(_run(kind, run, gpus, gpu_memory_bytes, link_bandwidth_bytes_per_s))
        recalled = len(run.steps.recalled)
        seconds = time.monotonic() - started_s + (journal.seconds if journal else 0.0)
        facts = {
            "date": date,
            "command": command,
            "mode": options["mode"],
            "passes": _passes(run.steps.disturbances, run.steps.passes_used),
            "seconds": f"{seconds:.1f}",
            "resumed": f"{recalled} of {len(run.steps.turns)} measurements are of {journal.date}"
            if journal and recalled
            else "",
            **host.describe(),
            "kernels": options["kernels"],
            "threads": f"{run.threads} of torch's, not pinned, as the executor leaves them",
            "others": others.describe(),
            **software(),
            **profile.environment,
            "warnings": "; ".join(_warnings(profile, others, run.steps.disturbance)),
        }
        profile = replace(profile, environment={key: text for key, text in facts.items() if text})
        if save is not None:
            save(profile)
            if journal is not None:
                journal.remove()
    return profile


def _run(
    kind: Literal["cuda", "emulated", "cpu"],
    run: Run,
    gpus: "list[AbstractGpu]",
    gpu_memory_bytes: int | None,
    link_bandwidth_bytes_per_s: float | None,
) -> HardwareProfile:
    """The figures of a machine of that kind; its environment is not whole yet."""
    match kind:
        case "cpu":
            return profile_cpu(run)
        case "emulated":
            return profile_emulated(
                run,
                min(EMULATED_GPU_BYTES, run.host.usable_ram_bytes // 8)
                if gpu_memory_bytes is None
                else gpu_memory_bytes,
                EMULATED_LINK_BYTES_PER_S if link_bandwidth_bytes_per_s is None else link_bandwidth_bytes_per_s,
            )
        case "cuda":
            return profile_cuda(run, gpus, gpu_memory_bytes)


def _passes(disturbances: Sequence[float], used: Sequence[int]) -> str:
    """How many passes there were, and what others did to those that were set aside."""
    aside = [share for index, share in enumerate(disturbances) if index not in used]
    if not aside:
        return str(len(disturbances))
    shares = ", ".join(f"{share:.0%}" for share in aside)
    return f"{len(used)}, and {len(aside)} set aside in which others kept {shares} of the hardware threads busy"


def _check_options(
    kind: str, dtypes: Sequence[str], gpu_memory_bytes: int | None, link_bandwidth: float | None
) -> None:
    for dtype in dtypes:
        if dtype not in DTYPE_BYTES:
            raise ProfileError("--dtype", dtype, f"must be one of {', '.join(DTYPE_BYTES)}", "correct it")
    if link_bandwidth is not None and kind != "emulated":
        raise ProfileError(
            "--link-bandwidth",
            link_bandwidth,
            "is what an emulated link is paced to",
            "leave it out or use --accelerator emulated",
        )
    if gpu_memory_bytes is not None and kind == "cpu":
        raise ProfileError(
            "--gpu-memory",
            gpu_memory_bytes,
            "needs a GPU level, which accelerator cpu has not",
            "leave it out or use --accelerator emulated",
        )


def _told(option: object) -> str:
    return "not given" if option is None else str(option)


def _resolve(accelerator: str) -> tuple[Literal["cuda", "emulated", "cpu"], tuple[int, ...]]:
    """The kind of machine, and the CUDA devices if it has any."""
    if accelerator == "cpu" or accelerator == "emulated":  # noqa: PLR1714 - narrows the type
        return accelerator, ()
    import torch

    name, _, which = accelerator.partition(":")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if accelerator == "auto":
        return ("cuda", (0,)) if count else ("cpu", ())
    words = (which or "0").split(",")
    if name != "cuda" or not (which == "all" or all(word.isdecimal() for word in words)):
        raise ProfileError(
            "--accelerator", accelerator, "must be auto, cuda:K, cuda:K,K, cuda:all, emulated or cpu", "choose one"
        )
    indices = range(count) if which == "all" else [int(word) for word in words]
    if len(set(indices)) < len(indices):
        raise ProfileError("--accelerator", accelerator, "names a device twice", "name each device once")
    if not indices or max(indices) >= count:
        raise ProfileError(
            "--accelerator", accelerator, f"torch {torch.__version__} sees {counted(count, 'CUDA device')}", REMEDY
        )
    return "cuda", tuple(indices)


def _gpus(indices: Sequence[int]) -> "list[AbstractGpu]":
    if not indices:
        return []
    from hrm.profiling.gpu import CudaGpu

    return [CudaGpu(index) for index in indices]


def _threads(host: HostFacts) -> int:
    """Threads that torch computes with, as in the executor: one a core, no more than it was told.

    Hyper-threads of one core share its arithmetic units, and MKL builds of torch leave them out.
    """
    import torch

    return max(1, min(host.compute_threads, torch.get_num_threads()))


def _identity(host: HostFacts, gpus: "Sequence[AbstractGpu]") -> dict[str, str]:
    """The machine, as far as measurements of another one must not be mixed with its own."""
    import torch

    return {
        "cpu": host.cpu_name,
        "usable cores": str(host.usable_cores),
        "ram": str(host.usable_ram_bytes),
        "gpus": ", ".join(gpu.name for gpu in gpus) or "none",
        "torch": str(torch.__version__),
        "torch threads": str(_threads(host)),
        "schema": str(SCHEMA),
    }


def _warnings(profile: HardwareProfile, others: Others, disturbance: float) -> list[str]:
    """What a reader of the figures must know, the most important first.

    Of `others` only if their share in what the figures come from, `disturbance`, is large.
    """
    found = [profile.environment["warnings"]] if profile.environment.get("warnings") else []
    if disturbance > BUSY:
        found.append(others.describe())
    noisy = [path for path, figure in figures_of(profile).items() if "noisy: " in figure.note]
    if noisy:
        found.append(f"{counted(len(noisy), 'figure')} noisy, {noisy[0]} among them")
    return found
