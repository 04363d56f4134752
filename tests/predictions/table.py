"""Works out the predictions of `table.json` again and tells which of their figures moved.

An entry holds what is asked, in plain values, and the figures that were predicted: a search, or the estimate of a
given policy. Nothing here is drawn at random, so a figure moves only if the model of the machine does.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hrm.estimate import Estimate, estimate
from hrm.hardware import HardwareProfile
from hrm.layers import ExpertDivision
from hrm.machines import compose, load_profile, with_memory
from hrm.model_spec import BUILT_IN_MODELS
from hrm.policy import Parallelism, Policy, ScheduleName
from hrm.search import Space, search, solver_named
from hrm.strict import decode_strictly
from hrm.tasks import Device
from hrm.workload import Workload

TABLE: Final = Path(__file__).parent / "table.json"
TOLERANCE: Final = 1e-9  # relative; what other ways of adding the same numbers up may change
Entry = dict[str, Any]
Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Move:
    """A figure of a prediction that is no longer what the table says; None where it did not or does not exist."""

    name: str
    figure: str
    was: Any
    now: Any

    def __str__(self) -> str:
        by = ""
        if isinstance(self.was, (int, float)) and isinstance(self.now, (int, float)) and self.was:
            by = f"  ({self.now / self.was - 1:+.3g} of it)"
        return f"{self.name}: {self.figure} was {self.was}, is {self.now}{by}"


def read_table() -> list[Entry]:
    return json.loads(TABLE.read_text())


def write_table(entries: list[Entry]) -> None:
    """One entry a block and one figure a line, so that a diff shows what moved."""
    blocks: list[str] = []
    for entry in entries:
        asked = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in entry.items() if key != "predicted"]
        figures = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in entry["predicted"].items()]
        blocks.append("{" + ",\n".join([*asked, ' "predicted": {\n' + ",\n".join(figures) + "\n }"])[1:] + "\n}")
    TABLE.write_text("[\n" + ",\n".join(blocks) + "\n]\n")


def predict(entry: Entry) -> Figures:
    """The figures of an entry as they are predicted today."""
    spec, profile = BUILT_IN_MODELS[entry["model"]], _machine(entry["machine"])
    workload = Workload(name="fixed", **entry["workload"])
    if "policy" in entry:
        policy = decode_strictly(entry["policy"], Policy, entry["name"])
        return _figures(estimate(spec, policy, profile, workload))
    asked = dict(entry["search"])
    solver = solver_named(asked.pop("solver", "exhaustive"))
    kinds = {"attention": Device, "ffn": Device, "schedule": ScheduleName, "parallelism": Parallelism}
    for option, kind in kinds.items():
        if option in asked:
            asked[option] = kind(asked[option])
    found = search(Space(spec, profile, workload, **asked), solver)
    if found.best is None:
        return {"outcome": found.outcome.value, "advice": " | ".join(found.advice())}
    policy, bound = found.best.policy, found.bound_tokens_per_s
    stages = f", stages of {policy.stage_lengths}" if policy.stage_lengths else ""
    whole = " of whole experts" if policy.expert_division is ExpertDivision.WHOLE else ""
    alone = f", on {policy.gpus} alone" if policy.gpus else ""
    return {
        "outcome": found.outcome.value,
        "policy": f"{found.best.paper_tuple} {policy.parallelism.value}{whole} "
        f"{sum(policy.resident_experts)} experts stay, "
        f"chunks of {policy.prefill_chunk_tokens}, staging {policy.staging}{stages}{alone}",
        "searched bound tokens/s": bound if math.isfinite(bound) else None,
        **_figures(found.best),
    }


def moves(entry: Entry, figures: Figures) -> Iterator[Move]:
    """What of an entry is no longer as the table says."""
    before: Figures = entry["predicted"]
    for figure in {**before, **figures}:
        was, now = before.get(figure), figures.get(figure)
        if not _same(was, now):
            yield Move(entry["name"], figure, was, now)


def _same(was: Any, now: Any) -> bool:
    if isinstance(was, str) or was is None or isinstance(now, str) or now is None:
        return was == now
    return math.isclose(was, now, rel_tol=TOLERANCE, abs_tol=1e-15)


def _machine(machine: Entry) -> HardwareProfile:
    """A machine of the catalogue, or GPUs in a host, with other memory sizes if they are given."""
    if "profile" in machine:
        return load_profile(machine["profile"])
    profile = compose(machine["gpus"], host=machine.get("host"))
    sizes = {level: machine[level] for level in ("gpu_memory_bytes", "cpu_memory_bytes") if level in machine}
    return with_memory(profile, **sizes) if sizes else profile


def _figures(predicted: Estimate) -> Figures:
    latency = predicted.latency
    figures: Figures = {
        "tokens/s": predicted.tokens_per_s,
        "bound tokens/s": predicted.bound_tokens_per_s,
        "ttft s": latency.mean_ttft_s,
        "last ttft s": latency.last_ttft_s,
        "tpot s": latency.tpot_s,
        "limit": predicted.limits.job.cause.value,
    }
    for name, phase in (("prefill", predicted.prefill), ("decode", predicted.decode)):
        figures[f"{name} s"] = phase.seconds
        figures |= {f"{name} {lane} s": seconds for lane, seconds in phase.work.busy_s.items() if seconds}
    for level in predicted.memory.levels:
        figures |= {f"{level.name} {purpose} bytes": size for purpose, size in level.purposes.items()}
    return figures
