"""What the machine is, whether its memory is really there, and how fast it is pinned and crosses the link."""

import mmap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Final

import torch

from executor.native import description, kernels
from hrm.formats import FORMATS
from hrm.profiling.environment import available_ram_bytes
from hrm.profiling.gpu import CudaGpu
from hrm.profiling.pinned import CudaRegistrar, PinnableMemory, touched
from hrm.units import GIB, MIB
from tests.bench.first_run.figures import Figures
from tests.bench.first_run.setting import RunSetting
from tests.bench.suite.record import all_versions, machine_facts

PIECE_BYTES: Final = {"full": 4 * GIB, "small": MIB}
LINK_BYTES: Final = {"full": 512 * MIB, "small": MIB // 4}
REPEATS: Final = 5
SLOWEST_BYTES_PER_S: Final = 0.3e9  # of touching memory: slower is a machine that swaps
LEFT_BYTES: Final = 6 * GIB  # of the host's, for libraries and the page table of what is pinned
SMALLEST_BYTES: Final = GIB // 4  # for which another piece is worth it
MORE_S: Final = 3.0  # to wait for a virtual machine to be given more
LOOK_S: Final = 0.25
SPARE_S: Final = 15.0  # of the stage's time, for what follows the ramp


def facts(setting: RunSetting, figures: Figures) -> None:
    """The machine, versions, and whether native kernels are there."""
    suite = setting.suite
    figures.put("machine", machine_facts(suite.accelerator))
    figures.put("versions", all_versions())
    figures.gate("native kernels", is_open=kernels() is not None, told=description())
    if suite.emulated:
        return
    gpu = CudaGpu(setting.device_index)
    free, total = gpu.memory_bytes()
    told = gpu.facts()
    figures.put("gpu", {**told.lines, "free_bytes": free, "total_bytes": total, "warnings": told.warnings})
    figures.put("gpu kernels", {"flash": torch.backends.cuda.is_flash_attention_available()})


def host(setting: RunSetting, figures: Figures) -> None:
    """Touch as much memory as there is, a piece after the other, and give it back.

    A virtual machine may have its memory only once it is used, or have more once what it has is used. What was there
    is what later stages plan with.
    """
    scale = setting.suite.scale
    available = available_ram_bytes()
    figures.put("host available before", available)
    caps = [cap for cap in (setting.host_memory_bytes, scale.host_memory_bytes) if cap is not None]
    start_s = time.monotonic()
    there = ramp(min(caps, default=2**62), PIECE_BYTES[scale.name], lambda: setting.suite.left_s() - SPARE_S)
    seconds = time.monotonic() - start_s
    figures.put("host touched", {"bytes": there, "bytes_per_s": there / max(seconds, 1e-9)})
    figures.put("host available after", available_ram_bytes())
    few = setting.few_layers
    needed = few.total_layer_bytes(FORMATS["bfloat16"]) * (1.3 if scale.name == "full" else 0)
    figures.gate("host memory", is_open=there >= needed, told=f"{there / 1e9:.0f} GB there, {needed / 1e9:.0f} needed")
    if setting.suite.emulated:
        figures.leave_out("pinning", "emulated")
        return
    _pinning(setting, figures)


def ramp(most: int, piece: int, left_s: Callable[[], float]) -> int:
    """Touch up to so much memory piece by piece, and give it all back; how much it was.

    It leaves some to the system, and ends with the time, or where memory is had as slowly as by a machine that swaps.
    """
    leave = min(LEFT_BYTES, available_ram_bytes() // 4)
    pieces, there, waited_s = list[torch.Tensor](), 0, 0.0
    while there < most and left_s() > 0:
        size = min(piece, most - there, (available_ram_bytes() - leave) // 2)
        if size < min(SMALLEST_BYTES, piece, most - there):
            if waited_s >= MORE_S:
                break
            time.sleep(LOOK_S)
            waited_s += LOOK_S
            continue
        piece_s, waited_s = time.monotonic(), 0.0
        pieces.append(touched(_mapped(size)))
        there += size
        if size / (time.monotonic() - piece_s) < SLOWEST_BYTES_PER_S and size >= SMALLEST_BYTES:
            break
    return there


def _mapped(num_bytes: int) -> torch.Tensor:
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _pinning(setting: RunSetting, figures: Figures) -> None:
    """What registering costs, and the link with memory as runs have it and with the driver's own."""
    device = setting.suite.accelerator
    torch.cuda.set_device(device)  # whose events are recorded
    memory, piece = PinnableMemory(CudaRegistrar(device)), PIECE_BYTES[setting.suite.scale.name]
    registered = memory.allocate(piece)
    with timed() as took:
        pinned = memory.pin(registered)
    figures.gate("pinning", is_open=pinned, told="the system registers memory" if pinned else "it does not")
    figures.put("pinning", {"s_per_gb": took[0] / piece * 1e9})
    size = LINK_BYTES[setting.suite.scale.name]
    kinds = {"registered": registered, "cudaHostAlloc": torch.zeros(size, dtype=torch.uint8, pin_memory=True)}
    there, back = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    for kind, host_memory in kinds.items():
        part = host_memory[:size]
        rates = {
            "h2d": rate(device, size, lambda part=part: there.copy_(part, non_blocking=True)),
            "d2h": rate(device, size, lambda part=part: part.copy_(back, non_blocking=True)),
        }
        figures.put(f"link, {kind}", rates)
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    halves = registered[:size], registered[size : 2 * size]

    def both() -> None:
        with torch.cuda.stream(streams[0]):
            there.copy_(halves[0], non_blocking=True)
        with torch.cuda.stream(streams[1]):
            halves[1].copy_(back, non_blocking=True)

    with timed() as took:
        for _ in range(REPEATS):
            both()
        torch.cuda.synchronize(device)
    figures.put("link, both ways at once", {"bytes_per_s_each": REPEATS * size / took[0]})
    small = torch.zeros(64, dtype=torch.uint8, device=device)

    def wake() -> None:
        small.zero_()
        event = torch.cuda.Event(blocking=True)
        event.record()
        event.synchronize()

    figures.put("wake-up", {"s": median(_seconds(wake) for _ in range(50))})


def rate(device: str, num_bytes: int, copy: Callable[[], object]) -> float:
    """Bytes a second, by the device's clock; the median."""
    seconds = list[float]()
    for _ in range(1 + REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        copy()
        end.record()
        torch.cuda.synchronize(device)
        seconds.append(start.elapsed_time(end) / 1e3)
    return num_bytes / median(seconds[1:])


@contextmanager
def timed() -> Iterator[list[float]]:
    """Seconds on the wall's clock, in the list once the block has ended."""
    took = list[float]()
    start_s = time.perf_counter()
    yield took
    took.append(time.perf_counter() - start_s)


def _seconds(call: Callable[[], object]) -> float:
    with timed() as took:
        call()
    return took[0]
