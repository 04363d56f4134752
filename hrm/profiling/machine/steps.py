"""Named measurements in order, with progress; what is found is kept as it comes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Progress = Callable[[float, float, str], None]


class ProfilingInterrupted(Exception):  # noqa: N818 - the user's wish, no error
    """Ctrl-C while measuring; `measured` and `lost` name the steps.

    No profile is made of half the figures; what was measured is in the journal, if there is one.
    """

    def __init__(self, measured: Sequence[str], lost: Sequence[str]) -> None:
        """Tell what is measured and what is not."""
        self.measured, self.lost = tuple(measured), tuple(lost)
        super().__init__(
            f"interrupted; measured: {', '.join(self.measured) or 'nothing'};"
            f" not measured: {', '.join(self.lost)}"
        )


class Keeper(Protocol):
    """Where steps are kept beyond the process, and found again."""

    def recall(self, name: str, kind: Any) -> tuple[bool, Any]:
        """Whether the step is known from before, and what it found, as a value of `kind`."""
        ...

    def keep(self, name: str, seconds: float, found: Any) -> None:
        """Keep what a step has found."""
        ...


@dataclass(frozen=True, slots=True)
class Step:
    """One measurement: `run` is called with its seconds and returns a value of type `kind`."""

    name: str
    weight: float
    run: Callable[[float], Any]
    kind: Any


@dataclass(slots=True)
class Steps:
    """Measurements in order; each gets its share of the time, and its result is kept.

    A part of the time is `part_s`, or less where all of them would take longer than `most_s`. A
    step may look up in `found` what earlier ones found.
    """

    part_s: float
    most_s: float
    progress: Progress | None = None
    keeper: Keeper | None = None
    clock: Callable[[], float] = time.monotonic
    steps: list[Step] = field(default_factory=list[Step])
    found: dict[str, Any] = field(default_factory=dict[str, Any])
    recalled: list[str] = field(default_factory=list[str])

    def add(self, name: str, weight: float, run: Callable[[float], Any], kind: Any) -> None:
        """Append a step that gets `weight` parts of the time and finds a `kind`."""
        self.steps.append(Step(name, weight, run, kind))

    def run(self) -> dict[str, Any]:
        """Everything measured, by the names of the steps.

        Steps that are known from before are not run again. Raises ProfilingInterrupted on Ctrl-C.
        """
        unit_s = min(self.part_s, self.most_s / sum(step.weight for step in self.steps))
        todo: list[Step] = []
        for step in self.steps:
            known, found = False, None
            if self.keeper is not None:
                known, found = self.keeper.recall(step.name, step.kind)
            if known:
                self.found[step.name] = found
                self.recalled.append(step.name)
            else:
                todo.append(step)
        start_s = self.clock()
        try:
            for index, step in enumerate(todo):
                self._tell(start_s, unit_s, todo, index)
                began_s = self.clock()
                found = step.run(unit_s * step.weight)
                if self.keeper is not None:
                    self.keeper.keep(step.name, self.clock() - began_s, found)
                self.found[step.name] = found
        except KeyboardInterrupt as error:
            lost = [step.name for step in self.steps if step.name not in self.found]
            raise ProfilingInterrupted(list(self.found), lost) from error
        self._tell(start_s, unit_s, todo, len(todo))
        return self.found

    def _tell(self, start_s: float, unit_s: float, todo: Sequence[Step], index: int) -> None:
        """Report the next step; the rest is expected to be as late as what is done was."""
        if self.progress is None:
            return
        done_s = self.clock() - start_s
        planned_s = unit_s * sum(step.weight for step in todo[:index])
        rest_s = unit_s * sum(step.weight for step in todo[index:])
        late = max(1.0, done_s / planned_s) if planned_s > 0 else 1.0
        text = todo[index].name if index < len(todo) else "done"
        self.progress(done_s, done_s + rest_s * late, text)
