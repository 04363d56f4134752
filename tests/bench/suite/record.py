"""A step's JSON: figures with the machine, date, command and versions that they belong to."""

import importlib.util
import json
import os
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, final

import msgspec

from executor import native
from executor.job.report import versions
from hrm.profiling.environment import host_facts
from hrm.units import format_bytes
from tests.bench.suite.setting import Setting

SCHEMA: Final = 1
SAME: Final = ("schema", "accelerator", "scale", "machine", "versions")  # or figures do not mix


def machine_facts(accelerator: str) -> dict[str, str]:
    """The host, its GPU, and what computes on the CPU."""
    facts = {"accelerator": accelerator, **host_facts().describe()}
    if accelerator.startswith("cuda"):
        import torch

        device = torch.cuda.get_device_properties(accelerator)
        facts["gpu"] = f"{device.name}, {format_bytes(device.total_memory)}"
    return facts | {"cpu_kernels": native.description()}


def all_versions() -> dict[str, str]:
    """Versions of what the figures depend on, the other side's too."""
    theirs = {
        name: version(name) for name in ("transformers", "accelerate") if importlib.util.find_spec(name) is not None
    }
    return {**versions(), **theirs}


@final
@dataclass(slots=True)
class Record:
    """What a step has found, written anew with every figure, so that an end by force loses little.

    `left_out` says why what is not among the figures is not there.
    """

    setting: Setting
    step: str
    figures: dict[str, Any] = field(default_factory=dict[str, Any])
    left_out: dict[str, str] = field(default_factory=dict[str, str])
    outcome: str = "partial"
    seconds: float = 0.0
    _started: str = ""
    _started_s: float = 0.0
    _facts: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        """Take over the figures of an earlier run on the same machine, if asked to resume."""
        self._started_s = time.monotonic()
        self._started = _now()
        self._facts = {
            "schema": SCHEMA,
            "accelerator": self.setting.accelerator,
            "emulated": self.setting.emulated,
            "scale": self.setting.scale.name,
            "machine": machine_facts(self.setting.accelerator),
            "versions": all_versions(),
        }
        before = read(self.path) if self.setting.resume else None
        if before is not None and all(before[key] == self._facts[key] for key in SAME):
            self.figures, self.seconds = before["figures"], before["seconds"]
            self._started, self.outcome = before["started"], before["outcome"]

    @property
    def path(self) -> Path:
        """The file of the step."""
        return self.setting.results / f"{self.step}.json"

    @property
    def complete(self) -> bool:
        """Whether an earlier run left nothing out."""
        return self.outcome == "complete"

    def put(self, name: str, figure: Any) -> None:
        """Add a figure and write the file."""
        self.figures[name] = msgspec.to_builtins(figure, str_keys=True)
        self.left_out.pop(name, None)
        self.write()

    def leave_out(self, name: str, reason: str) -> None:
        """Say why there is no such figure."""
        self.left_out[name] = reason
        print(f"  {name} left out: {reason}", flush=True)
        self.write()

    def finish(self) -> None:
        """Say that everything was tried."""
        self.outcome = "partial" if self.left_out else "complete"
        self.write()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        now_s = time.monotonic()
        self.seconds, self._started_s = self.seconds + now_s - self._started_s, now_s
        content = {
            "step": self.step,
            "outcome": self.outcome,
            "started": self._started,
            "ended": _now(),
            "seconds": round(self.seconds, 1),
            "load_average": round(os.getloadavg()[0], 2),
            "command": self.setting.command,
            **self._facts,
            "left_out": self.left_out,
            "figures": self.figures,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)


def read(path: Path) -> dict[str, Any] | None:
    """What a step has written; None if it was not run."""
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
