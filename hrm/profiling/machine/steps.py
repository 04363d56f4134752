"""Named measurements in several passes, with progress; what is found is kept as it comes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Final, Protocol

from hrm.profiling.environment import BUSY
from hrm.profiling.passes import combine

FEWEST_PASSES: Final = 3

Progress = Callable[[float, float, str], None]


class ProfilingInterrupted(Exception):  # noqa: N818 - the user's wish, no error
    """Ctrl-C while measuring; `measured` and `lost` name the steps and their passes.

    No profile is made of half the figures; what was measured is in the journal, if there is one.
    """

    def __init__(self, measured: Sequence[str], lost: Sequence[str]) -> None:
        """Tell what is measured and what is not."""
        self.measured, self.lost = tuple(measured), tuple(lost)
        super().__init__(
            f"interrupted; measured: {', '.join(self.measured) or 'nothing'}; not measured: {', '.join(self.lost)}"
        )


class Watch(Protocol):
    """Looks at the machine from when it was made."""

    def share(self) -> float:
        """Share of all hardware threads that others have kept busy since then."""
        ...


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
    """One measurement: `run` is called with its seconds and returns a value of type `kind`.

    One that is taken `once` is not repeated in every pass.
    """

    name: str
    weight: float
    run: Callable[[float], Any]
    kind: Any
    once: bool = False


@dataclass(frozen=True, slots=True)
class PassStep:
    """A step in one of the passes."""

    step: Step
    name: str
    seconds: float


@dataclass(slots=True)
class Steps:
    """Measurements in order, all of them in every pass; each gets its share of the time.

    A part of the time is `part_s`, or less where all of them would take longer than `most_s`. Once
    `FEWEST_PASSES` are made, none is begun that would end after `most_s`. A pass during which
    others kept over `BUSY` of the machine, as a `watch` made at its start tells, is disturbed: in
    its place another is made if there is time, and it is set aside if `FEWEST_PASSES` are not
    disturbed. While a pass goes on, a step may look up in `found` what earlier ones found in it; in
    the end it holds what all passes found that were not set aside.
    """

    part_s: float
    most_s: float
    progress: Progress | None = None
    keeper: Keeper | None = None
    passes: int = 1
    clock: Callable[[], float] = time.monotonic
    watch: Callable[[], Watch] | None = None
    steps: list[Step] = field(default_factory=list[Step])
    found: dict[str, Any] = field(default_factory=dict[str, Any])
    recalled: list[str] = field(default_factory=list[str])
    turns: list[PassStep] = field(default_factory=list[PassStep])
    disturbances: list[float] = field(default_factory=list[float])  # others' share in each pass

    def add(self, name: str, weight: float, run: Callable[[float], Any], kind: Any, *, once: bool = False) -> None:
        """Append a step that gets `weight` parts of the time and finds a `kind`."""
        self.steps.append(Step(name, weight, run, kind, once))

    def run(self) -> dict[str, Any]:
        """Everything measured, by the names of the steps.

        Turns that are known from before are not taken again. Raises ProfilingInterrupted on Ctrl-C.
        """
        passes = [self._pass(index) for index in range(self.passes)]
        self.turns = [turn for one in passes for turn in one]
        known: dict[str, Any] = {}
        for turn in self.turns:
            self._recall(turn, known)
        self.recalled = list(known)
        start_s = self.clock()
        try:
            self._run(passes, known, start_s)
        except KeyboardInterrupt as error:
            lost = [turn.name for turn in self.turns if turn.name not in known]
            raise ProfilingInterrupted(list(known), lost) from error
        self._tell(start_s, [], "done", 0.0)
        used = {turn.name for index in self.passes_used for turn in passes[index]}
        found_of = {
            step.name: [
                known[turn.name] for turn in self.turns if turn.step is step and (step.once or turn.name in used)
            ]
            for step in self.steps
        }
        self.found = {name: combine(found) for name, found in found_of.items()}
        return self.found

    @property
    def passes_used(self) -> list[int]:
        """Indices of the passes whose figures count: without disturbed ones if enough are not."""
        calm = [index for index, share in enumerate(self.disturbances) if share <= BUSY]
        enough = len(calm) >= min(FEWEST_PASSES, len(self.disturbances))
        return calm if enough else list(range(len(self.disturbances)))

    @property
    def disturbance(self) -> float:
        """Others' share of the machine during the passes whose figures count."""
        return fmean(self.disturbances[index] for index in self.passes_used)

    def _pass(self, index: int) -> list[PassStep]:
        """The turns of a pass, or of one in place of a disturbed one."""
        unit_s = min(self.part_s, self.most_s / sum(step.weight for step in self.steps))
        which = f"{index + 1} of {self.passes}"
        if index >= self.passes:
            which = f"{index + 1 - self.passes} in place of a disturbed one"
        return [
            PassStep(
                step,
                step.name if step.once or self.passes == 1 else f"{step.name} ({which})",
                unit_s * step.weight / (1 if step.once else self.passes),
            )
            for step in self.steps
            if index == 0 or not step.once
        ]

    def _recall(self, turn: PassStep, known: dict[str, Any]) -> None:
        if self.keeper is not None:
            is_known, found = self.keeper.recall(turn.name, turn.step.kind)
            if is_known:
                known[turn.name] = found

    def _run(self, passes: list[list[PassStep]], known: dict[str, Any], start_s: float) -> None:
        """Take all turns that are not known; what they find joins `known`.

        Passes in place of disturbed ones join `passes`.
        """
        longest_s = planned_s = 0.0
        for index, turns in enumerate(passes):  # may grow meanwhile
            began_s = self.clock()
            late = began_s + longest_s > start_s + self.most_s
            if late and index >= FEWEST_PASSES and turns[0].name not in known:
                self.turns = [turn for one in passes[:index] for turn in one]
                break
            watch = self.watch() if self.watch else None
            for turn in turns:
                if turn.name not in known:
                    left = [one for one in self.turns if one.name not in known]
                    self._tell(start_s, left, turn.name, planned_s)
                    known[turn.name] = self._take(turn)
                    planned_s += turn.seconds
                self.found[turn.step.name] = known[turn.name]
            longest_s = max(longest_s, self.clock() - began_s)
            self.disturbances.append(self._disturbance(index, watch))
            if index + 1 == len(passes) and self._wants_another():
                passes.append(self._pass(index + 1))
                self.turns += passes[-1]
                for turn in passes[-1]:
                    self._recall(turn, known)

    def _disturbance(self, index: int, watch: Watch | None) -> float:
        """Others' share in a pass just made; that of one from before is known if it was kept."""
        if watch is None:
            return 0.0
        name = f"others in pass {index + 1}"
        if self.keeper is None:
            return watch.share()
        is_known, share = self.keeper.recall(name, float)
        if not is_known:
            share = watch.share()
            self.keeper.keep(name, 0.0, share)
        return share

    def _wants_another(self) -> bool:
        """Whether fewer passes than planned are undisturbed, and not all too often."""
        calm = sum(share <= BUSY for share in self.disturbances)
        return self.passes > 1 and calm < self.passes and len(self.disturbances) < 2 * self.passes

    def _take(self, turn: PassStep) -> Any:
        began_s = self.clock()
        found = turn.step.run(turn.seconds)
        if self.keeper is not None:
            self.keeper.keep(turn.name, self.clock() - began_s, found)
        return found

    def _tell(self, start_s: float, left: Sequence[PassStep], text: str, planned_s: float) -> None:
        """Report the next turn; the rest is expected to be as late as what is done was."""
        if self.progress is None:
            return
        done_s = self.clock() - start_s
        rest_s = sum(turn.seconds for turn in left)
        late = max(1.0, done_s / planned_s) if planned_s > 0 else 1.0
        self.progress(done_s, done_s + rest_s * late, text)
