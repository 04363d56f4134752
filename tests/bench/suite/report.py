"""All figures of a results folder as one Markdown table, and what became of the goals."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hrm.errors import HrmError
from hrm.tasks import Lane
from hrm.units import format_bytes
from tests.bench.suite.record import read
from tests.bench.suite.schedules import FEW, OWN, SAME
from tests.bench.suite.setting import CAPS

FILE: Final = "report.md"
LINK_BUSY: Final = 0.95
LINK_SHARE: Final = 0.95
BOUND_SHARE: Final = 0.90
OVER_FLEXGEN: Final = 1.5
OVER_ACCELERATE: Final = 5.0
PADDING: Final = 1.05
COLUMNS: Final = (
    "schedule",
    "N, μ",
    "attention",
    "tokens/s",
    "decode/s",
    "step",
    "predicted",
    "of the bound",
    "H2D busy",
    "H2D while busy",
    "GPU busy",
    "CPU attention",
    "GPU peak of planned",
    "CGOPipe is",
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One figure of a step `mixtral-…`, by name."""

    figure: dict[str, Any]

    @property
    def row(self) -> dict[str, Any]:
        """What the executor measured."""
        return self.figure["row"]

    @property
    def tokens_per_s(self) -> float:
        """Of the whole job."""
        return self.row["tokens_per_s"]

    @property
    def predicted(self) -> float:
        """Tokens/s by HRM's simulation."""
        return self.row["predicted_tokens_per_s"]

    @property
    def bound_share(self) -> float:
        """Of HRM's bound."""
        return self.tokens_per_s / self.row["bound_tokens_per_s"]

    @property
    def link_bound(self) -> bool:
        """Whether decode was predicted to be limited by the link to the GPU."""
        return self.figure["bottleneck"].startswith(Lane.H2D.value)

    @property
    def link_busy(self) -> float:
        """Share of decode."""
        return self.row["decode_busy_share"].get("H2D", 0.0)

    @property
    def link_share(self) -> float:
        """Bytes a second to the GPU while the link is busy, as a share of the profile's."""
        return self.row["decode_bytes_per_s"].get("H2D", 0.0) / self.figure["h2d_bytes_per_s"]

    def memory(self, level: str) -> tuple[int, int]:
        """Peak and planned bytes; on the GPU the peak is the allocator's, where there is one."""
        told = self.row["validation"]["memory"][level]
        peak = told["peak_total_bytes"]
        if level == "gpu" and self.figure["allocator_peak_bytes"] is not None:
            # The allocator's counts cuBLAS's workspace, which is beside the plan.
            peak = self.figure["allocator_peak_bytes"] - self.figure.get("library_bytes", 0)
        return peak, told["planned_total_bytes"]

    def cells(self, name: str, ratio: float) -> list[str]:
        """A line of the table."""
        row, policy = self.row, self.figure["policy"]
        step, busy = row["decode_step_s"], row["decode_busy_share"]
        h2d, attention = row["decode_bytes_per_s"].get("H2D"), row["attention_bytes_per_s"]
        peak, planned = self.memory("gpu")
        return [
            name,
            f"{policy['batch_size']}, {policy['micro_batch_size']}",
            policy["attention"],
            f"{self.tokens_per_s:.4g}",
            f"{row['decode_tokens_per_s']:.4g}",
            f"{step['median']:.3g} s ({step['p20']:.3g}–{step['p80']:.3g}, n {step['n']})",
            f"{self.predicted:.4g} ({self.predicted / self.tokens_per_s - 1:+.0%})",
            f"{self.bound_share:.0%}",
            f"{self.link_busy:.0%}",
            f"{h2d / 1e9:.3g} GB/s ({self.link_share:.0%})" if h2d else "–",
            f"{busy.get('GPU', 0.0):.0%}",
            f"{attention / 1e9:.3g} GB/s" if attention else "–",
            f"{format_bytes(peak)} of {format_bytes(planned)}",
            f"{ratio:.2f}×",
        ]


@dataclass(frozen=True, slots=True)
class Goal:
    """What is asked for, what was measured, and whether it does; None if that cannot be told."""

    text: str
    measured: str
    reached: bool | None

    def line(self) -> str:
        """For the report."""
        unknown = "does not apply" if self.measured else "not measured"
        word = {True: "reached", False: "not reached", None: unknown}[self.reached]
        return f"- {self.text}: **{word}**" + (f" ({self.measured})" if self.measured else "")


def write(folder: Path) -> None:
    """Print the report and write it beside the results; HrmError if there are none."""
    text = report(folder)
    (folder / FILE).write_text(text, encoding="utf-8")
    print(text)


def report(folder: Path) -> str:
    """The report of a results folder."""
    steps = {path.stem: content for path in sorted(folder.glob("*.json")) if (content := read(path)) is not None}
    if not steps:
        raise HrmError("--results", str(folder), "must hold results", "run the other steps first")
    lines = list(_heading(steps))
    goals = list(_goals_of_tests(steps.get("tests")))
    for cap in CAPS:
        ours, theirs = steps.get(f"mixtral-{cap}"), steps.get(f"accelerate-{cap}")
        if ours is not None or theirs is not None:
            lines += ["", f"## GPU memory capped at {cap}", "", *_tables(ours, theirs)]
        goals += _goals(cap, ours, theirs)
    left_out = [
        f"- {step}: {name}: {reason}" for step, content in steps.items() for name, reason in content["left_out"].items()
    ]
    lines += ["", "## Goals", "", *(goal.line() for goal in goals)]
    if left_out:
        lines += ["", "## Left out", "", *left_out]
    return "\n".join(lines) + "\n"


def _heading(steps: dict[str, dict[str, Any]]) -> Iterator[str]:
    last = max(steps.values(), key=lambda content: content["ended"])
    machine, versions = last["machine"], last["versions"]
    yield f"# {machine.get('gpu', machine['accelerator'])}"
    if any(content["emulated"] or content["scale"] != "full" for content in steps.values()):
        yield ""
        yield "**Emulated on the CPU or at a small scale: no figure here is of a GPU.**"
    yield ""
    yield f"{machine['cpu']}, {machine['usable_cores']}, {machine['ram']}; {machine['cpu_kernels']}"
    yield ", ".join(f"{name} {number}" for name, number in versions.items())
    yield ""
    for step, content in steps.items():
        took = f"{content['ended']}, {content['seconds']:.0f} s, {content['outcome']}"
        yield f"- {step}: {took}: `{content['command']}`"


def _figures(content: dict[str, Any] | None, kind: str) -> dict[str, Measured]:
    figures = content["figures"] if content else {}
    return {
        name.removeprefix(f"{kind}: "): Measured(figure)
        for name, figure in figures.items()
        if name.startswith(f"{kind}: ")
    }


def _tables(ours: dict[str, Any] | None, theirs: dict[str, Any] | None) -> Iterator[str]:
    own, few_layers, same = (_figures(ours, kind) for kind in (OWN, FEW, SAME))
    best = theirs["figures"].get("best") if theirs else None
    if ours is not None:
        model = ours["figures"]["model"]
        yield f"{model['name']}, {model['num_layers']} layers:"
        yield ""
    rows = [
        measured.cells(name, own["cgopipe"].tokens_per_s / measured.tokens_per_s)
        for name, measured in own.items()
        if "cgopipe" in own
    ]
    if best is not None:
        ratio = f"{own['cgopipe'].tokens_per_s / best['tokens_per_s']:.2f}×" if own else "–"
        rows.append(_other_side(best, ratio))
    yield from _table(rows)
    if few_layers and ours is not None:
        yield ""
        yield f"Each under its own best policy, on {ours['figures']['model']['few_layers']} of the layers:"
        yield ""
        first = few_layers.get("cgopipe")
        yield from _table(
            measured.cells(name, first.tokens_per_s / measured.tokens_per_s if first else 0.0)
            for name, measured in few_layers.items()
        )
    if same:
        yield ""
        few = next(iter(same.values())).row["decode_step_s"]["n"]
        yield (
            "All under CGOPipe's policy, where FlexGen's order stands for S3 and S4, over "
            f"{few} decode steps; the ratio is of decode:"
        )
        yield ""
        first = next(iter(same.values()))
        yield from _table(
            measured.cells(name, first.row["decode_tokens_per_s"] / measured.row["decode_tokens_per_s"])
            for name, measured in same.items()
        )


def _other_side(best: dict[str, Any], ratio: str) -> list[str]:
    """Their line: what of it there is."""
    step = best["step_s"]
    cells = dict.fromkeys(COLUMNS, "–") | {
        "schedule": f"transformers + accelerate, {best['resident_layers']} layers resident, {best['cache']} cache",
        "N, μ": f"{best['batch_size']}",
        "attention": "gpu",
        "tokens/s": f"{best['tokens_per_s']:.4g}, put together from its phases",
        "decode/s": f"{best['decode_tokens_per_s']:.4g}",
        "step": f"{step['median']:.3g} s ({step['p20']:.3g}–{step['p80']:.3g}, n {step['n']})",
        "GPU peak of planned": format_bytes(best["peak_bytes"]) if best["peak_bytes"] else "–",
        "CGOPipe is": ratio,
    }
    return [cells[column] for column in COLUMNS]


def _table(rows: Any) -> Iterator[str]:
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "|" + "---|" * len(COLUMNS)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _goals_of_tests(tests: dict[str, Any] | None) -> Iterator[Goal]:
    counts = tests["figures"].get("counts") if tests else None
    text = "backend contract and parity tests pass"
    if counts is None:
        yield Goal(text, "", None)
        return
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    yield Goal(text, told, counts["passed"] > 0 and not counts["failed"] + counts["errors"])


def _goals(cap: str, ours: dict[str, Any] | None, theirs: dict[str, Any] | None) -> Iterator[Goal]:
    own, few_layers = _figures(ours, OWN), _figures(ours, FEW)
    everything = [*own.values(), *few_layers.values(), *_figures(ours, SAME).values()]
    cgopipe = own.get("cgopipe")
    text = f"{cap}: link ≥ {LINK_BUSY:.0%} busy in decode at ≥ {LINK_SHARE:.0%} of its bandwidth"
    if cgopipe is None:
        yield Goal(text, "", None)
        return
    told = f"{cgopipe.link_busy:.1%} busy at {cgopipe.link_share:.1%}"
    if cgopipe.link_bound:
        busy = cgopipe.link_busy >= LINK_BUSY and cgopipe.link_share >= LINK_SHARE
        yield Goal(text, told, busy)
    else:
        yield Goal(text, f"{told}, but limited by {cgopipe.figure['bottleneck']}", None)
    yield Goal(
        f"{cap}: ≥ {BOUND_SHARE:.0%} of HRM's bound", f"{cgopipe.bound_share:.1%}", cgopipe.bound_share >= BOUND_SHARE
    )
    for name, other in (("flexgen", "S4"), ("flexgen-c", "S3")):
        text = f"{cap}: CGOPipe ≥ {OVER_FLEXGEN}× our {other}"
        if not {name, "cgopipe"} <= few_layers.keys():
            yield Goal(text, "", None)
            continue
        here, there = few_layers["cgopipe"], few_layers[name]
        ratio = here.tokens_per_s / there.tokens_per_s
        told = f"{ratio:.2f}×, {here.predicted / there.predicted:.2f}× predicted"
        yield Goal(text, told, ratio >= OVER_FLEXGEN)
    best = theirs["figures"].get("best") if theirs else None
    text = f"{cap}: CGOPipe ≥ {OVER_ACCELERATE:g}× transformers + accelerate"
    ratio = cgopipe.tokens_per_s / best["tokens_per_s"] if best else 0.0
    yield Goal(text, f"{ratio:.2f}×" if best else "", ratio >= OVER_ACCELERATE if best else None)
    shares = [peak / planned for peak, planned in (one.memory("gpu") for one in everything)]
    yield Goal(f"{cap}: GPU peak ≤ planned in every run", f"greatest {max(shares):.1%}", max(shares) <= 1)
    yield Goal(
        f"{cap}: no plan padded by more than {PADDING - 1:.0%}",
        f"{1 / min(shares) - 1:.1%} at most",
        min(shares) * PADDING >= 1,
    )
