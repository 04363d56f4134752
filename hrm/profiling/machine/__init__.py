"""From benchmarks to the profile of this machine.

A profile is a list of steps, each with its share of the time; what a step finds is used by the
next ones (a GEMM's rate is taken without the launch latency). `cpu`, `emulated` and `cuda` say what
is measured on each kind of machine.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final, Literal

from hrm.errors import ProfileError
from hrm.hardware import HardwareProfile
from hrm.model_spec import ModelSpec
from hrm.profiling.environment import host_facts, software
from hrm.profiling.machine.cpu import profile_cpu
from hrm.profiling.machine.cuda import profile_cuda
from hrm.profiling.machine.emulated import (
    EMULATED_GPU_BYTES,
    EMULATED_LINK_BYTES_PER_S,
    profile_emulated,
)
from hrm.profiling.machine.run import Run
from hrm.profiling.machine.steps import ProfilingInterrupted, Progress, Steps
from hrm.units import DTYPE_BYTES

__all__ = ["DTYPES", "EMULATED_LINK_BYTES_PER_S", "ProfilingInterrupted", "profile_machine"]

DTYPES: Final = ("bfloat16", "float16", "float32")
QUICK_S: Final = 20.0
FULL_S: Final = 240.0


def profile_machine(
    accelerator: str = "auto",
    *,
    gpu_memory_bytes: int | None = None,
    link_bandwidth_bytes_per_s: float | None = None,
    quick: bool = False,
    model: ModelSpec | None = None,
    dtypes: Sequence[str] = DTYPES,
    progress: Progress | None = None,
    command: str = "",
    budget_s: float | None = None,
) -> HardwareProfile:
    """Measure this machine: about 20 s if `quick`, else 4 min; `budget_s` asks for other times.

    `accelerator` is `cuda:K`, `emulated`, `cpu`, or `auto` for the first GPU if there is one and
    the CPU if not. Emulated, the GPU level holds `gpu_memory_bytes` and its links are paced to
    `link_bandwidth_bytes_per_s`. GEMMs have the shapes of `model`. The first of `dtypes` is that
    of the KV cache. `progress(done_s, total_s, what)` is called before each step and at the end.
    Raises ProfileError if there is no such accelerator, ProfilingInterrupted on Ctrl-C.
    """
    kind, device = _resolve(accelerator)
    for dtype in dtypes:
        if dtype not in DTYPE_BYTES:
            raise ProfileError(
                "--dtype", dtype, f"must be one of {', '.join(DTYPE_BYTES)}", "correct it"
            )
    if link_bandwidth_bytes_per_s is not None and kind != "emulated":
        raise ProfileError(
            "--link-bandwidth", link_bandwidth_bytes_per_s,
            "is what an emulated link is paced to", "leave it out or use --accelerator emulated",
        )  # fmt: skip
    if gpu_memory_bytes is not None and kind == "cpu":
        raise ProfileError(
            "--gpu-memory", gpu_memory_bytes, "needs a GPU level, which accelerator cpu has not",
            "leave it out or use --accelerator emulated",
        )  # fmt: skip
    started_s, host = time.monotonic(), host_facts()
    run = Run(
        host=host,
        quick=quick,
        model=model,
        dtypes=tuple(dict.fromkeys(dtypes)),
        steps=Steps(budget_s or (QUICK_S if quick else FULL_S), progress),
    )
    match kind:
        case "cpu":
            profile = profile_cpu(run)
        case "emulated":
            profile = profile_emulated(
                run,
                gpu_memory_bytes or min(EMULATED_GPU_BYTES, host.usable_ram_bytes // 8),
                link_bandwidth_bytes_per_s or EMULATED_LINK_BYTES_PER_S,
            )
        case "cuda":
            profile = profile_cuda(run, device, gpu_memory_bytes)
    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "mode": "quick" if quick else "full",
        "seconds": f"{time.monotonic() - started_s:.1f}",
        **host.describe(),
        **software(),
        **profile.environment,
    }
    return replace(profile, environment={key: text for key, text in facts.items() if text})


def _resolve(accelerator: str) -> tuple[Literal["cuda", "emulated", "cpu"], str]:
    if accelerator == "cpu" or accelerator == "emulated":  # noqa: PLR1714 - narrows the type
        return accelerator, "cpu"
    import torch

    name, _, index = accelerator.partition(":")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if accelerator == "auto":
        return ("cuda", "cuda:0") if count else ("cpu", "cpu")
    if name != "cuda" or not (index or "0").isdigit():
        raise ProfileError(
            "--accelerator", accelerator, "must be auto, cuda:K, emulated or cpu", "choose one"
        )
    if int(index or 0) >= count:
        raise ProfileError(
            "--accelerator", accelerator, f"torch {torch.__version__} sees {count} CUDA devices",
            "use --accelerator emulated or cpu, or install a CUDA build of torch",
        )  # fmt: skip
    return "cuda", f"cuda:{index or 0}"
