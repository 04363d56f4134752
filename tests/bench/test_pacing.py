"""How closely an emulated link keeps to its stated bandwidth on this machine's real clock."""

import time

from hrm.contract.pacing import PacedCopy
from hrm.units import MIB


def test_pacing() -> None:
    print("\nemulated link: stated, held over at least 0.5 s (goal: within 2 %)")
    for bandwidth_bytes_per_s in (25e6, 100e6, 2e9):
        pace = PacedCopy(latency_s=20e-6, bandwidth_bytes_per_s=bandwidth_bytes_per_s)
        size = min(4 * MIB, int(bandwidth_bytes_per_s / 100))
        source, target = bytes(size), bytearray(size)

        def copy(source: bytes = source, target: bytearray = target) -> None:
            target[:] = source

        count = round(0.6 / pace.seconds(size))
        start_s = time.perf_counter()
        for _ in range(count):
            pace.run(copy, size, ready_s=start_s)
        seconds = time.perf_counter() - start_s - count * pace.latency_s
        held = count * size / seconds
        print(
            f"  {bandwidth_bytes_per_s / 1e6:>6.0f} MB/s  {held / 1e6:>8.1f} MB/s  "
            f"{held / bandwidth_bytes_per_s - 1:+.2%}"
        )
