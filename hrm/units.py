"""Bytes, rates and durations: SI inside, converted where people read and write them.

GB is 10^9 bytes and GiB is 2^30 bytes, here and in everything that is printed.
"""

import re
from typing import Final

from hrm.errors import UnitError

KB: Final = 10**3
MB: Final = 10**6
GB: Final = 10**9
TB: Final = 10**12
KIB: Final = 2**10
MIB: Final = 2**20
GIB: Final = 2**30
TIB: Final = 2**40

TERA: Final = 10**12

_BYTES_PER_UNIT: Final = {
    "": 1, "B": 1,
    "KB": KB, "MB": MB, "GB": GB, "TB": TB,
    "KIB": KIB, "MIB": MIB, "GIB": GIB, "TIB": TIB,
}  # fmt: skip
_FLOPS_PER_UNIT: Final = {"": 1, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_QUANTITY: Final = re.compile(r"([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)")

DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}


def parse_bytes(text: str, where: str = "size") -> int:
    """Read `16GB`, `15.5GiB` or a bare number of bytes; returns bytes.

    Raises UnitError naming `where` if the text is no positive size.
    """
    match = _QUANTITY.fullmatch(text.strip())
    unit = _BYTES_PER_UNIT.get(match[2].upper()) if match else None
    size_bytes = float(match[1]) * unit if match and unit else 0.0
    if not 1 <= size_bytes < 2**63:
        raise UnitError(
            where, text, "must be a positive size in B, KB, MB, GB, TB, KiB, MiB, GiB or TiB",
            "write it like 16GB or 15.5GiB",
        )  # fmt: skip
    return round(size_bytes)


def parse_bandwidth(text: str, where: str = "bandwidth") -> float:
    """Read `12GB/s` (or `12GB`, or bytes a second); returns bytes a second."""
    try:
        return float(parse_bytes(text.removesuffix("/s"), where))
    except UnitError as error:
        raise UnitError(
            where, text, "must be a positive rate in B/s, KB/s, MB/s, GB/s, MiB/s or GiB/s",
            "write it like 12GB/s",
        ) from error  # fmt: skip


def parse_flops(text: str, where: str = "compute") -> float:
    """Read `65TFLOP/s` (or `65T`, or FLOP a second); returns FLOP a second."""
    match = _QUANTITY.fullmatch(
        re.sub(r"flops?(/s)?$", "", text.strip(), flags=re.IGNORECASE).strip()
    )
    unit = _FLOPS_PER_UNIT.get(match[2].upper()) if match else None
    flops_per_s = float(match[1]) * unit if match and unit else 0.0
    if not 1 <= flops_per_s < 1e30:
        raise UnitError(
            where, text, "must be a positive rate in FLOP/s, GFLOP/s, TFLOP/s or PFLOP/s",
            "write it like 65TFLOP/s",
        )  # fmt: skip
    return flops_per_s


def format_bytes(num_bytes: float) -> str:
    """Print a size in decimal units with three significant digits: `16.0 GB`."""
    for unit, size in (("TB", TB), ("GB", GB), ("MB", MB), ("kB", KB)):
        if abs(num_bytes) >= size:
            return f"{_three_digits(num_bytes / size)} {unit}"
    return f"{num_bytes:.0f} B"


def format_bandwidth(bytes_per_s: float) -> str:
    """Print a rate: `12.0 GB/s`."""
    return f"{format_bytes(bytes_per_s)}/s"


def format_flops(flops_per_s: float) -> str:
    """Print a compute rate: `65.0 TFLOP/s`."""
    for unit, size in (("TFLOP/s", 1e12), ("GFLOP/s", 1e9)):
        if abs(flops_per_s) >= size:
            return f"{_three_digits(flops_per_s / size)} {unit}"
    return f"{flops_per_s:.3g} FLOP/s"


def format_count(count: float) -> str:
    """Print a number of parameters: `46.7 B`, `5.7 M`."""
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def counted(count: int, what: str) -> str:
    """Print how many: `1 batch`, `2 batches`."""
    ending = "" if count == 1 else "es" if what.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{count} {what}{ending}"


def format_seconds(seconds: float) -> str:
    """Print a duration from microseconds to hours: `1.25 ms`, `2 h 05 min`."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    if seconds >= 60:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{_three_digits(seconds / size)} {unit}"
    return f"{_three_digits(seconds * 1e6)} µs"


def _three_digits(value: float) -> str:
    whole_digits = len(str(int(abs(value))))
    return f"{value:.{max(0, 3 - whole_digits)}f}"
