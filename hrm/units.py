"""Bytes, rates and durations: SI inside, converted where people read and write them.

GB is 10^9 bytes and GiB is 2^30 bytes, here and in everything that is printed.
"""

import math
import re
from typing import Final

from hrm.errors import UnitError

KB: Final = 10**3
MB: Final = 10**6
GB: Final = 10**9
TB: Final = 10**12
LARGEST: Final = 1e18  # of bytes, rates and seconds of a machine; 64 bits hold such an integer
_MOST_DIGITS: Final = 18
KIB: Final = 2**10
MIB: Final = 2**20
GIB: Final = 2**30
TIB: Final = 2**40

_BYTES_PER_UNIT: Final = {
    "B": 1,
    "KB": KB,
    "MB": MB,
    "GB": GB,
    "TB": TB,
    "KIB": KIB,
    "MIB": MIB,
    "GIB": GIB,
    "TIB": TIB,
}
_FLOPS_PER_UNIT: Final = {"M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_SECONDS_PER_UNIT: Final = {
    "ns": 1e-9,
    "us": 1e-6,
    "µs": 1e-6,
    "μs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "sec": 1.0,
    "min": 60.0,
    "h": 3600.0,
}
_QUANTITY: Final = re.compile(r"([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-zµμ]*)")
_BITS: Final = re.compile(r"[KMGT]i?(?:b|bits?)", re.ASCII)  # `Gb`: with a small b, they are bits


def parse_bytes(text: str, where: str = "size") -> int:
    """Read `16GB`, `15.5GiB` or `512B`; returns bytes.

    Raises UnitError naming `where` if the text is no positive size or has no unit.
    """
    number, unit = _number_and_unit(text)
    if _is_bare(number, unit):
        raise _unit_missing(where, text, _likely_size(number))
    size_bytes = float(number) * _BYTES_PER_UNIT.get(unit.upper(), 0) if number else 0.0
    if not 1 <= size_bytes <= LARGEST:
        raise UnitError(
            where,
            text,
            f"must be a positive size in B, KB, MB, GB, TB, KiB, MiB, GiB or TiB, at most {LARGEST / TB:,.0f} TB",
            "write it like 16GB or 15.5GiB",
        )
    return round(size_bytes)


def parse_bandwidth(text: str, where: str = "bandwidth") -> float:
    """Read `12GB/s` (or `12GB`); returns bytes a second.

    Raises UnitError naming `where` if the text is no positive rate, has no unit, or is in bits.
    """
    number, unit = _number_and_unit(text.strip().removesuffix("/s"))
    if _is_bare(number, unit):
        raise _unit_missing(where, text, f"{_likely_size(number)}/s")
    if number and _BITS.fullmatch(unit):
        whole = f"{float(number) / 8:.6g}{unit.partition('b')[0]}B/s"
        rule = "must be in bytes a second, not bits"
        raise UnitError(where, text, rule, f"write it like {whole}")
    try:
        return float(parse_bytes(f"{number}{unit}", where))
    except UnitError as error:
        rule = f"must be a positive rate in B/s, KB/s, MB/s, GB/s, MiB/s or GiB/s, at most {LARGEST / GB:,.0f} GB/s"
        raise UnitError(where, text, rule, "write it like 12GB/s") from error


def parse_flops(text: str, where: str = "compute") -> float:
    """Read `65TFLOP/s` (or `65T`, or `2e12 FLOP/s`); returns FLOP a second.

    Raises UnitError naming `where` if the text is no positive rate or has no unit.
    """
    stripped = text.strip()
    prefixed = re.sub(r"flops?(/s)?$", "", stripped, flags=re.IGNORECASE)
    number, unit = _number_and_unit(prefixed)
    if _is_bare(number, unit) and prefixed == stripped:
        guess = f"{number}TFLOP/s" if float(number) < _FEW else f"{number}FLOP/s"
        raise _unit_missing(where, text, guess)
    factor = _FLOPS_PER_UNIT.get(unit.upper(), 0) if unit else 1.0
    flops_per_s = float(number) * factor if number else 0.0
    if not 1 <= flops_per_s < 1e30:
        raise UnitError(
            where, text, "must be a positive rate in FLOP/s, GFLOP/s, TFLOP/s or PFLOP/s", "write it like 65TFLOP/s"
        )
    return flops_per_s


def parse_seconds(text: str, where: str = "duration", *, is_latency: bool = False) -> float:
    """Read `5us`, `200ms`, `30s`, `1.5min` or `2h`; returns seconds. A latency of a machine may be none.

    Raises UnitError naming `where` if the text is no positive duration or has no unit.
    """
    number, unit = _number_and_unit(text)
    if _is_bare(number, unit):
        raise _unit_missing(where, text, _likely_latency(number) if is_latency else f"{number}s")
    known = unit.lower() in _SECONDS_PER_UNIT
    seconds = float(number) * _SECONDS_PER_UNIT[unit.lower()] if number and known else -1.0
    if not (0 < seconds < math.inf or (is_latency and seconds == 0)):
        example = "5us" if is_latency else "30s"
        raise UnitError(where, text, "must be a positive duration in us, ms, s, min or h", f"write it like {example}")
    return seconds


_FEW: Final = 10_000  # a bare number below this is hardly one of bytes
_SHORT_S: Final = 0.01  # nor a latency above this one of seconds


def _number_and_unit(text: str) -> tuple[str, str]:
    """Both as they were written; two empty texts where they are not a number and a word."""
    match = _QUANTITY.fullmatch(text.strip())
    return (match[1], match[2]) if match else ("", "")


def _is_bare(number: str, unit: str) -> bool:
    """Whether only the unit is missing: the number itself may be meant."""
    return bool(number) and not unit and 0 < float(number) < 2**63


def _likely_size(number: str) -> str:
    return f"{number}GB" if float(number) < _FEW else f"{number}B"


def _likely_latency(number: str) -> str:
    return f"{number}us" if float(number) > _SHORT_S else f"{number}s"


def _unit_missing(where: str, text: str, guess: str) -> UnitError:
    return UnitError(where, text, "needs a unit", f"did you mean {guess}?")


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
    for unit, size in (("TFLOP/s", 1e12), ("GFLOP/s", 1e9), ("MFLOP/s", 1e6)):
        if abs(flops_per_s) >= size:
            return f"{_three_digits(flops_per_s / size)} {unit}"
    return f"{flops_per_s:.0f} FLOP/s"


def format_number(value: float) -> str:
    """Print a number with four significant digits or more and no exponent: `0.02`, `335.5`, `4393`, `101,990`."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if abs(value) >= 9999.5:
        return f"{value:,.0f}"
    if abs(value) < 1e-4:
        return f"{value:.{3 - math.floor(math.log10(abs(value)))}f}".rstrip("0")
    return f"{value:.4g}"


def format_count(count: float) -> str:
    """Print a number of parameters: `46.7 B`, `5.7 M`."""
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def is_whole_number(text: str) -> bool:
    """Whether it is decimal digits, and no more than anything that is counted has: `int` raises for thousands."""
    return text.isdecimal() and len(text) <= _MOST_DIGITS


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
    if 0 < seconds < 1e-8:
        return f"{_three_digits(seconds * 1e9)} ns"
    return f"{_three_digits(seconds * 1e6)} µs"


def at_least_seconds(seconds: float) -> str:
    """A duration that is no less, as `parse_seconds` reads it: `46s`, `1.3ms`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{_rounded_up(seconds / size)}{unit}"
    return f"{_rounded_up(seconds * 1e6)}us"


def at_least_bytes(num_bytes: float) -> str:
    """A size that is no less, as `parse_bytes` reads it: `16.1GB`."""
    for unit, size in (("TB", TB), ("GB", GB), ("MB", MB), ("kB", KB)):
        if num_bytes >= size:
            return f"{_rounded_up(num_bytes / size)}{unit}"
    return f"{math.ceil(num_bytes)}B"


def _rounded_up(value: float) -> str:
    """With three significant digits, no less than the value."""
    digits = max(0, 3 - len(str(int(value))))
    return f"{math.ceil(value * 10**digits) / 10**digits:.{digits}f}"


def _three_digits(value: float) -> str:
    if math.isinf(value):
        return str(value)
    whole_digits = len(str(int(abs(value))))
    return f"{value:.{max(0, 3 - whole_digits)}f}"
