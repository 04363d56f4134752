"""What each chart of a roofline picture shows, and between which intensities."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from hrm.hardware import HardwareProfile
from hrm.model_spec import ModelSpec
from hrm.plots import style
from hrm.plots.roofs import SAME, Ceiling, Mark, Role, Slope, attention_marks, ceilings, ffn_marks, slopes

KV: Final = "KV in"


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One chart: what it shows and between which intensities and FLOP/s."""

    title: str
    row_word: str
    slopes: list[Slope]
    ceilings: list[Ceiling]
    marks: list[Mark]
    xs: tuple[float, float]
    ys: tuple[float, float]

    @property
    def stagger(self) -> int:
        """Rows that the marks of one dtype need above the chart to stand side by side."""
        inches = 0.85 * style.PAGE_INCHES / math.log10(self.xs[1] / self.xs[0])
        rows = 1
        for dtype in {mark.dtype for mark in self.marks}:
            at = sorted(math.log10(m.intensity) for m in self.marks if m.dtype == dtype and m.label)
            gaps = [inches * (b - a) for a, b in pairwise(at)]
            rows = max([rows, *(math.ceil(0.3 / max(gap, 0.08)) for gap in gaps)])
        return rows

    @property
    def dtypes(self) -> list[str]:
        """Dtypes of the marks, in their order."""
        return list(dict.fromkeys(mark.dtype for mark in self.marks))

    def prefix(self, dtype: str) -> str:
        """What stands before the labels of that dtype's marks: `N =`, or `KV in float16`."""
        if self.row_word == KV:
            return f"{KV} {dtype}"
        return self.row_word if len(self.dtypes) == 1 else f"{dtype}: {self.row_word}"

    @property
    def turning(self) -> list[Mark]:
        """The marks whose turning points are shown: the last, and so the largest, of each dtype."""
        last = {mark.dtype: mark for mark in self.marks if mark.points is not None}
        return list(last.values())

    def shows_balance(self, mark: Mark) -> bool:
        """Whether GPU memory would outrun its compute, so that balance point and P2 differ."""
        points = mark.points
        assert points is not None
        assert mark.in_gpu_memory is not None
        height = mark.in_gpu_memory * points.balance / points.p2
        visible = points.balance < self.xs[1] and height < self.ys[1]
        return visible and points.balance > points.p2 * (1 + SAME)


def panels_of(
    profile: HardwareProfile,
    spec: ModelSpec | None,
    dtypes: tuple[str, ...],
    contexts: tuple[int, ...],
    batch_sizes: tuple[int, ...],
    micro_batch_size: int,
) -> list[Panel]:
    """One panel of the bare machine; with a model, one of its attention and one of its FFN."""
    compute = ceilings(profile, dtypes)
    memory = slopes(profile, dtypes, of_kv=False)
    if spec is None:
        return [_panel(", ".join(dtypes), "", memory, compute, [])]
    attention = attention_marks(profile, spec, dtypes, contexts)
    ffn = ffn_marks(profile, spec, dtypes, batch_sizes=batch_sizes, micro_batch_size=micro_batch_size)
    single = len({mark.dtype for mark in attention}) == len(attention)
    at_context = "context " + " or ".join(map(str, sorted(set(contexts)))) if single else ""
    micro = f"micro-batches of {micro_batch_size}" if profile.has_accelerator else ""
    return [
        _panel(
            _joined(f"{spec.name}: decode attention over the KV cache", at_context),
            KV,
            slopes(profile, dtypes, of_kv=True),
            compute,
            attention,
        ),
        _panel(
            _joined(f"{spec.name}: MoE FFN over the experts' weights", micro),
            "N =" if profile.has_accelerator else "μ =",
            memory,
            compute,
            ffn,
        ),
    ]


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _panel(title: str, row_word: str, lines: list[Slope], compute: list[Ceiling], marks: list[Mark]) -> Panel:
    """A panel whose axes hold every ridge, or every mark with its turning points."""
    planned = {slope.name: slope.bytes_per_s[slope.planned] for slope in lines}
    ridges = [
        slope.limit(slope.planned) / planned[slope.name]
        for slope in lines
        if slope.role not in {Role.DISK, Role.CACHE} or not marks
    ]
    ridges += [c.flops_per_s[c.planned] / c.memory(c.planned) for c in compute]
    xs = [*ridges, *(mark.intensity for mark in marks)]
    for mark in marks:
        xs += [mark.points.p1, mark.points.p2] if mark.points is not None else []
    low, high = min(xs) / 6, max(xs) * 6
    tops = [value for c in compute for value in c.flops_per_s.values()]
    attained = [mark.in_place for mark in marks]
    attained += [mark.fetched for mark in marks if mark.fetched is not None]
    if marks:  # where the operators are, with some air under them
        bottom = min([*attained, *(c.flops_per_s[c.planned] for c in compute)]) / 6
    else:
        bottom = min(min(planned.values()) * low * 3, min(tops) / 30)
    ys = (max(bottom, max(tops) / 1e8), max(tops) * 2.5)
    return Panel(title=title, row_word=row_word, slopes=lines, ceilings=compute, marks=marks, xs=(low, high), ys=ys)
