"""From the columns of a table to an axis: words for what a name says, and a unit that fits."""

from dataclasses import dataclass
from typing import Any, Final

from hrm.errors import HrmError

_WORDS: Final = {
    "gpu": "GPU",
    "cpu": "CPU",
    "h2d": "host-to-device",
    "d2h": "device-to-host",
    "ffn": "FFN",
    "kv": "KV",
    "num": "number of",
    "len": "length",
    "gen": "generation",
    "gpus": "GPUs",
}
_NAMES: Final = {
    "tokens_per_s": "tokens generated a second",
    "bound_tokens_per_s": "bound of tokens generated a second",
    "batch_s": "seconds a batch",
    "batch_size": "batch size N",
    "micro_batch_size": "micro-batch size μ",
    "num_gpus": "GPUs",
}
_TOKENS: Final = ("prompt_len", "gen_len")
# Endings with the units they may be shown in, the greatest first.
_UNITS: Final = (
    ("_bytes_per_s", (("TB/s", 1e12), ("GB/s", 1e9), ("MB/s", 1e6), ("B/s", 1.0))),
    ("_bytes", (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("B", 1.0))),
    ("_flops_per_s", (("PFLOP/s", 1e15), ("TFLOP/s", 1e12), ("GFLOP/s", 1e9), ("FLOP/s", 1.0))),
    ("_s", (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))),
)


@dataclass(frozen=True, slots=True)
class AxisText:
    """What to write at an axis, and what its column's values are divided by."""

    label: str
    unit_size: float


def axis_of(name: str, values: Any) -> AxisText:
    """The axis of a column; the unit is the greatest in which half of the values are 1 or more."""
    import numpy as np

    for ending, units in _UNITS:
        if name.endswith(ending) and name not in _NAMES:
            known = np.abs(np.asarray(values, dtype=float))
            known = known[np.isfinite(known)]
            middle = float(np.median(known)) if len(known) else 1.0
            unit, size = next((u for u in units if middle >= u[1]), units[-1])
            words = _spelled(name.removesuffix(ending))
            if ending == "_flops_per_s":
                words += " compute"
            return AxisText(f"{words} ({unit})", size)
    if name in _TOKENS:
        return AxisText(f"{_spelled(name)} (tokens)", 1.0)
    return AxisText(_NAMES.get(name) or _spelled(name), 1.0)


def _spelled(name: str) -> str:
    return " ".join(_WORDS.get(word, word) for word in name.split("_"))


def require_columns(frame: Any, names: list[str | None], where: str) -> None:
    """Refuse a table that lacks a column or has no rows (HrmError)."""
    missing = [name for name in names if name is not None and name not in frame.columns]
    if missing:
        raise HrmError(
            where,
            missing,
            f"must be columns of the table, which has {', '.join(frame.columns)}",
            "name others or add them",
        )
    if not len(frame):
        raise HrmError(where, "<no rows>", "needs at least one row to draw", "add some")
