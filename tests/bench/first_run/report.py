"""What a run found, as a table and in sentences."""

from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from tests.bench.first_run.figures import Figures, closed_gates, latest
from tests.bench.first_run.setting import RunSetting

FILE: Final = "report.md"
HEAD: Final = (
    "run",
    "tokens/s",
    "predicted",
    "of the bound",
    "prefill/s",
    "decode/s",
    "link busy in decode",
    "its rate of the profile's",
    "GPU busy",
    "GPU peak of planned",
)


def report(setting: RunSetting, figures: Figures) -> None:
    """Write the report, and print it."""
    print(write(setting.folder), file=figures.out)


def write(folder: Path) -> str:
    """Write the report beside the figures, if there is room; returns it."""
    known = latest(folder)
    accelerator = known.get("machine", {}).get("accelerator", "emulated")
    emulated = accelerator == "emulated"
    lines = [f"# {'No GPU: emulated on the CPU' if emulated else known.get('gpu', {}).get('gpu', accelerator)}", ""]
    if emulated:
        lines += ["**No figure here is of a GPU.**", ""]
    lines += _table(known)
    lines += ["", *(f"- {line}" for line in _sentences(known))]
    lines += [f"- **ended early: {line}**" for line in closed_gates(folder)]
    lines += [f"- **{name}**: {value}" for name, value in known.items() if name.endswith((" failed", " ended"))]
    lines += [
        f"- {name} left out: {value['left_out']}"
        for name, value in known.items()
        if isinstance(value, dict) and "left_out" in value
    ]
    text = "\n".join(lines) + "\n"
    with suppress(OSError):
        (folder / FILE).write_text(text, encoding="utf-8")
    return text


def _table(known: dict[str, Any]) -> list[str]:
    rows = [(name, value) for name, value in known.items() if isinstance(value, dict) and "decode_busy_share" in value]
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    return lines + ["| " + " | ".join(_cells(name, row)) + " |" for name, row in rows]


def _cells(name: str, row: dict[str, Any]) -> list[str]:
    busy, rate = row["decode_busy_share"], row["tokens_per_s"]
    link = row["decode_bytes_per_s"].get("H2D", 0.0) / row["h2d_bytes_per_s"]
    gpu = row["memory"]["gpu"]
    return [
        name,
        f"{rate:.4g}",
        f"{row['predicted_tokens_per_s']:.4g} ({row['predicted_tokens_per_s'] / rate - 1:+.0%})",
        f"{rate / row['bound_tokens_per_s']:.0%}",
        f"{row['prefill_tokens_per_s']:.4g}",
        f"{row['decode_tokens_per_s']:.4g}",
        f"{busy.get('H2D', 0.0):.1%}",
        f"{link:.0%}",
        f"{busy.get('GPU', 0.0):.0%}",
        f"{gpu['peak_total_bytes'] / gpu['planned_total_bytes']:.1%}",
    ]


def _sentences(known: dict[str, Any]) -> list[str]:
    """The questions that the run was for."""
    found: list[str] = []
    for name in ("tests", "tests of ranks", "tests of ranks in processes"):
        if name in known:
            tests = known[name]
            found.append(f"{name}: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped")
    ours = known.get("few layers: cgopipe")
    if ours is not None and "tokens_per_s" in ours:
        others = {"S4": known.get("few layers: S4")}
        theirs = [value for name, value in known.items() if name.startswith("few layers: transformers, batch of")]
        best = max((one for one in theirs if "tokens_per_s" in one), key=lambda one: one["tokens_per_s"], default=None)
        others["transformers with accelerate's offload"] = best
        for name, other in others.items():
            if other is not None and "tokens_per_s" in other:
                ratio = ours["tokens_per_s"] / other["tokens_per_s"]
                found.append(f"on as many layers CGOPipe is {ratio:.2f} times {name}")
        if "card_used_bytes" in ours:
            beside = ours["card_used_bytes"] - ours["most_reserved_bytes"]
            found.append(f"beside what torch holds the card has {beside / 1e9:.2f} GB in use")
    return found
