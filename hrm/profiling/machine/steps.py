"""Named measurements in order, with progress."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Progress = Callable[[float, float, str], None]


class ProfilingInterrupted(Exception):  # noqa: N818 - the user's wish, no error
    """Ctrl-C while measuring; `measured` and `lost` name the steps, `results` has what was found.

    No profile is made of half the figures.
    """

    def __init__(self, results: dict[str, Any], lost: Sequence[str]) -> None:
        """Tell what is measured and what is lost."""
        self.results, self.measured, self.lost = results, tuple(results), tuple(lost)
        super().__init__(
            f"interrupted; measured: {', '.join(self.measured) or 'nothing'};"
            f" not measured: {', '.join(self.lost)}"
        )


@dataclass(slots=True)
class Steps:
    """Named measurements in order; each is called with its seconds and its result is kept."""

    total_s: float
    progress: Progress | None
    steps: list[tuple[str, float, Callable[[float], Any]]] = field(
        default_factory=list[tuple[str, float, Callable[[float], Any]]]
    )

    def add(self, name: str, weight: float, run: Callable[[float], Any]) -> None:
        """Append a step that gets `weight` parts of the time."""
        self.steps.append((name, weight, run))

    def run(self) -> dict[str, Any]:
        """Everything measured, by the names of the steps."""
        results: dict[str, Any] = {}
        unit_s = self.total_s / sum(weight for _, weight, _ in self.steps)
        start_s = time.monotonic()
        for index, (name, weight, run) in enumerate(self.steps):
            self._tell(start_s, unit_s * sum(w for _, w, _ in self.steps[index:]), name)
            try:
                results[name] = run(unit_s * weight)
            except KeyboardInterrupt as error:
                lost = [name for name, _, _ in self.steps[index:]]
                raise ProfilingInterrupted(results, lost) from error
        self._tell(start_s, 0.0, "done")
        return results

    def _tell(self, start_s: float, remaining_s: float, text: str) -> None:
        if self.progress is not None:
            done_s = time.monotonic() - start_s
            self.progress(done_s, done_s + remaining_s, text)
