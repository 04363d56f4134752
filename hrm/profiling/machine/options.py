"""What of a machine is measured, and with what."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Final

from hrm.contract.host_kernels import HostKernels
from hrm.errors import ProfileError
from hrm.formats import FORMATS
from hrm.model_spec import ModelSpec
from hrm.scaling import Resource
from hrm.units import KIB, format_bandwidth, format_bytes, is_whole_number

DTYPES: Final = ("bfloat16", "float16", "float32")
QUICK_PART_S: Final = 0.75  # a part of a step in all passes; machines have 30 to 100 of them
FULL_PART_S: Final = 7.0
MOST_QUICK_S: Final = 53.0  # after which no pass may end; one in place of a disturbed one may fit
MOST_FULL_S: Final = 570.0
MOST_EMULATED: Final = 8
SMALLEST_ARENA: Final = 4 * KIB
LONGEST_TRANSFER_S: Final = 0.25  # slow links are swept over smaller transfers
LEAST_LINK_BYTES_PER_S: Final = SMALLEST_ARENA / LONGEST_TRANSFER_S


@dataclass(frozen=True, slots=True)
class ProfileOptions:
    """What is asked of a measurement.

    `accelerator` is `cuda:0`, `cuda:0,1` or `cuda:all`, `emulated`, `cpu`, or `auto` for the first
    GPU if there is one and the CPU if not. Emulated, the GPU level holds `gpu_memory_bytes` and its
    links are paced to `link_bandwidth_bytes_per_s`; with `emulated:2` two accelerators share the memory,
    each with such links. It takes under a minute if `quick`, else about eight; or `budget_s`. GEMMs have
    the shapes of `model`. The first of `dtypes` is that of the KV cache. `disk` is the folder whose disk
    is measured. `kernels` compute on the CPU instead of torch. Finished steps are kept in the file
    `partial`, which is locked against other processes, and `resume` goes on with those that it holds.
    `command` is told in the profile.
    """

    accelerator: str = "auto"
    gpu_memory_bytes: int | None = None
    link_bandwidth_bytes_per_s: float | None = None
    quick: bool = False
    budget_s: float | None = None
    model: ModelSpec | None = None
    dtypes: Sequence[str] = DTYPES
    disk: Path | None = None
    kernels: HostKernels | None = None
    partial: Path | None = None
    resume: bool = False
    command: str = ""

    def without_bfloat16(self) -> "ProfileOptions":
        """For a GPU that has none: plans and runs are in float16 then, which is measured in its place."""
        return replace(self, dtypes=tuple("float16" if dtype == "bfloat16" else dtype for dtype in self.dtypes))

    @property
    def emulated_count(self) -> int:
        """How many emulated accelerators there are to be; ProfileError if that is no number from 1 on."""
        _, _, count = self.accelerator.partition(":")
        if count and not (is_whole_number(count) and 1 <= int(count) <= MOST_EMULATED):
            rule = f"must be emulated, or emulated:N for up to {MOST_EMULATED} accelerators"
            raise ProfileError("--accelerator", self.accelerator, rule, "correct it")
        return int(count or 1)

    @property
    def mode(self) -> str:
        """Whether it is quick, in a word."""
        return "quick" if self.quick else "full"

    @property
    def part_and_most_s(self) -> tuple[float, float]:
        """Seconds of a part of a step in all passes, and after which no pass may end."""
        if self.budget_s is not None:
            return inf, self.budget_s
        return (QUICK_PART_S, MOST_QUICK_S) if self.quick else (FULL_PART_S, MOST_FULL_S)

    @property
    def kernels_name(self) -> str:
        """What computes on the CPU."""
        return self.kernels.name if self.kernels else "torch"

    def check(self, kind: str) -> None:
        """Raise ProfileError if a machine of that kind cannot be measured so."""
        if (
            kind == "emulated"
            and self.emulated_count > 1
            and (self.kernels is None or self.kernels.sums_between is None)
        ):
            raise ProfileError(
                "--accelerator",
                self.accelerator,
                "needs the executor, whose ranks are measured, with its native kernels",
                "install it with a C++ compiler, or use --accelerator emulated",
            )
        for dtype in self.dtypes:
            if dtype not in FORMATS:
                raise ProfileError("--dtype", dtype, f"must be one of {', '.join(FORMATS)}", "correct it")
        if self.link_bandwidth_bytes_per_s is not None and kind != "emulated":
            raise ProfileError(
                "--link-bandwidth",
                f"<{format_bandwidth(self.link_bandwidth_bytes_per_s)}>",
                "is what an emulated link is paced to",
                "leave it out or use --accelerator emulated",
            )
        if self.link_bandwidth_bytes_per_s is not None and self.link_bandwidth_bytes_per_s < LEAST_LINK_BYTES_PER_S:
            raise ProfileError(
                "--link-bandwidth",
                f"<{format_bandwidth(self.link_bandwidth_bytes_per_s)}>",
                f"must be at least {format_bandwidth(LEAST_LINK_BYTES_PER_S)}, or a measurement would take hours",
                "ask for more",
            )
        if kind == "emulated" and self.gpu_memory_bytes is not None:
            check_gpu_memory(self.gpu_memory_bytes, self.emulated_count)
        if self.gpu_memory_bytes is not None and kind == "cpu":
            raise ProfileError(
                "--gpu-memory",
                f"<{format_bytes(self.gpu_memory_bytes)}>",
                "needs a GPU level, which accelerator cpu has not",
                "leave it out or use --accelerator emulated",
            )

    def that_must_agree(self, accelerator: str) -> dict[str, str]:
        """Those that must be the same for a measurement to go on, as texts."""
        return {
            "accelerator": accelerator,
            "--gpu-memory": _told(self.gpu_memory_bytes),
            "--link-bandwidth": _told(self.link_bandwidth_bytes_per_s),
            "--disk": _told(self.disk),
            "--dtype": ", ".join(self.dtypes),
            "mode": self.mode,
            "model": repr(self.model) if self.model else "not given",
            "kernels": self.kernels_name,
        }


def check_gpu_memory(num_bytes: int, count: int) -> None:
    """Raise ProfileError if so many bytes are too few for a level of `count` GPUs."""
    least, _ = Resource.GPU_MEMORY.least_and_most(count)
    if num_bytes < least:
        rule = f"must be at least {format_bytes(least)}, a page for each GPU"
        raise ProfileError("--gpu-memory", f"<{format_bytes(num_bytes)}>", rule, "ask for more")


def _told(option: object) -> str:
    return "not given" if option is None else str(option)
