"""From benchmarks to the profile of this machine.

A profile is a list of steps, each with its share of the time, that are taken in several passes;
what a step finds is used by the next ones (a GEMM's rate is taken without the launch latency).
`options` is what is asked for, `cpu`, `emulated` and `cuda` say what is measured on each kind of
machine, `host` what all have; `journal` keeps finished steps.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Literal

from hrm.errors import ProfileError, meant
from hrm.hardware import SCHEMA, HardwareProfile
from hrm.profile_diff import figures_of
from hrm.profiling.environment import BUSY, HostFacts, Others, host_facts, software
from hrm.profiling.machine.cpu import profile_cpu
from hrm.profiling.machine.cuda import profile_cuda
from hrm.profiling.machine.emulated import EMULATED_LINK_BYTES_PER_S, profile_emulated
from hrm.profiling.machine.journal import Journal, partial_path
from hrm.profiling.machine.options import DTYPES, ProfileOptions
from hrm.profiling.machine.run import Run
from hrm.profiling.machine.steps import ProfilingInterrupted, Progress, Steps
from hrm.profiling.passes import flag_noisy
from hrm.units import counted, is_whole_number

if TYPE_CHECKING:
    from hrm.profiling.gpu import AbstractGpu

__all__ = [
    "DTYPES",
    "EMULATED_LINK_BYTES_PER_S",
    "ProfileOptions",
    "ProfilingInterrupted",
    "partial_path",
    "profile_machine",
]

AcceleratorKind = Literal["cuda", "emulated", "cpu"]


PASSES: Final = 7
REMEDY: Final = "use --accelerator emulated or cpu, or install a CUDA build of torch"


def profile_machine(
    options: ProfileOptions,
    *,
    save: Callable[[HardwareProfile], object] | None = None,
    progress: Progress | None = None,
) -> HardwareProfile:
    """Measure this machine.

    Everything is measured in seven passes, fewer where they would take too long, and the spreads
    say how far they differ. A pass that others disturbed is made again if there is time. `save` is
    called with the whole profile, after which the file of finished steps is removed.
    `progress(done_s, total_s, what)` is called before each step and at the end.
    Raises ProfileError if there is no such accelerator, or what was kept is of another machine or
    being written by another process, ProfilingInterrupted on Ctrl-C.
    """
    kind, indices = _resolve(options.accelerator)
    options.check(kind)
    started_s, others, host = time.monotonic(), Others(), host_facts()
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    gpus = _gpus(indices)
    journal = None
    if options.partial is not None:
        told = {"cuda": f"cuda:{','.join(map(str, indices))}", "emulated": options.accelerator}
        accelerator = told.get(kind, kind)
        measures = options.that_must_agree(accelerator) | _identity(host, gpus)
        journal = Journal(options.partial, measures, date=date, resume=options.resume)
    with closing(journal) if journal else nullcontext():
        steps = Steps(*options.part_and_most_s, progress, journal, PASSES, watch=Others)
        run = Run(host=host, threads=_threads(host), options=options, steps=steps)
        profile = flag_noisy(_run(kind, run, gpus))
        seconds = time.monotonic() - started_s + (journal.seconds if journal else 0.0)
        facts = {
            "date": date,
            "command": options.command,
            "mode": options.mode,
            **_of_passes(steps, seconds, journal),
            **_environment(run, profile, others),
        }
        profile = replace(profile, environment={key: text for key, text in facts.items() if text})
        if save is not None:
            save(profile)
            if journal is not None:
                journal.remove()
    return profile


def _run(kind: AcceleratorKind, run: Run, gpus: "list[AbstractGpu]") -> HardwareProfile:
    """The figures of a machine of that kind; its environment is not whole yet."""
    match kind:
        case "cpu":
            return profile_cpu(run)
        case "emulated":
            return profile_emulated(run)
        case "cuda":
            return profile_cuda(run, gpus)


def _of_passes(steps: Steps, seconds: float, journal: Journal | None) -> dict[str, str]:
    """How many passes there were, how long they took, and how many steps are from before."""
    facts = {"passes": _passes(steps.disturbances, steps.passes_used), "seconds": f"{seconds:.1f}"}
    if journal and steps.recalled:
        facts["resumed"] = f"{len(steps.recalled)} of {len(steps.turns)} measurements are of {journal.date}"
    return facts


def _environment(run: Run, profile: HardwareProfile, others: Others) -> dict[str, str]:
    """What was measured, with what, and what a reader of the figures must know."""
    return {
        **run.host.describe(),
        "kernels": run.options.kernels_name,
        "threads": f"{run.threads} of torch's, not pinned, as the executor leaves them",
        "others": others.describe(),
        **software(),
        **profile.environment,
        "warnings": "; ".join(_warnings(profile, others, run.steps.disturbance)),
    }


def _passes(disturbances: Sequence[float], used: Sequence[int]) -> str:
    """How many passes there were, and what others did to those that were set aside."""
    aside = [share for index, share in enumerate(disturbances) if index not in used]
    if not aside:
        return str(len(disturbances))
    shares = ", ".join(f"{share:.0%}" for share in aside)
    return f"{len(used)}, and {len(aside)} set aside in which others kept {shares} of the hardware threads busy"


def _resolve(accelerator: str) -> tuple[AcceleratorKind, tuple[int, ...]]:
    """The kind of machine, and the CUDA devices if it has any."""
    name, _, which = accelerator.partition(":")
    if accelerator == "cpu":
        return "cpu", ()
    if name == "emulated":
        return "emulated", ()
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if accelerator == "auto":
        return ("cuda", (0,)) if count else ("cpu", ())
    words = (which or "0").split(",")
    if name != "cuda" or not (which == "all" or all(map(is_whole_number, words))):
        raise ProfileError(
            "--accelerator",
            accelerator,
            "must be auto, cuda:K, cuda:K,K, cuda:all, emulated, emulated:N or cpu",
            meant(accelerator, ("auto", "cuda:all", "emulated", "cpu"), "choose one"),
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
