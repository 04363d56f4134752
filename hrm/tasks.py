"""The vocabulary of schedules: lanes, acts, buffers, tasks and the graph that they form.

An act is a kind of task: it says which lane its tasks run in, what they touch and what they take. A task is inert
data. List order in a graph is topological and is each lane's issue order, so neither the simulator nor the executor
can deadlock.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from hrm.acts.load import Counts, Load
    from hrm.numeric import Number
    from hrm.schedules.pipeline import Pipeline


class Lane(StrEnum):
    """What works in order: a CUDA stream or a thread."""

    GPU = "GPU"
    CPU = "CPU"
    H2D = "H2D"
    D2H = "D2H"
    STAGE = "STAGE"

    @property
    def computes(self) -> bool:
        """Whether its tasks compute; those of all other lanes move bytes."""
        return self is Lane.GPU or self is Lane.CPU

    @property
    def is_link(self) -> bool:
        """Whether what its tasks move crosses a link between host and GPU."""
        return self is Lane.H2D or self is Lane.D2H

    __hash__ = str.__hash__  # Enum would hash the name in Python, and simulations hash a lot


class Device(StrEnum):
    """Where data lies or work is done: the top level's processor or the host's."""

    GPU = "gpu"
    CPU = "cpu"

    @property
    def words(self) -> str:
        """How reports write it: `GPU`, `CPU`."""
        return self.value.upper()


class Phase(StrEnum):
    """The two phases of generating from a batch of prompts."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """Memory that tasks hand things over in; `turns` of them are used one after the other, 0 if each thing has its own.

    A buffer that `grows` keeps all that was ever written to it: nothing in it is overwritten.
    """

    name: str
    turns: int = 0
    grows: bool = False

    def turn(self, number: int, piece: int = 0) -> "BufferPart":
        """A piece of what comes into a buffer used in turns as so many were before."""
        return (self, number % self.turns, number, piece)


# A piece of one version of what lies in a slot of a buffer: buffer, slot, version, piece. A slot is a number, or two
# for a buffer with one for each layer and micro-batch. Pieces of a version are written in order by one lane, so whoever
# reads one finds all before it. Plain tuples, as simulations make several for every task.
BufferPart = tuple[Buffer, int | tuple[int, ...], int, int]
Touch = tuple[tuple[BufferPart, ...], tuple[BufferPart, ...]]  # what a task reads, and what it writes
NOTHING: Touch = ((), ())


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Act:
    """A kind of task of one phase: all that the planner, the simulator and the executor know of it.

    `letter` is what its tasks print as, `name` what files call it and `words` what reports do. Its tasks `touch` parts
    of buffers, from which edges follow, and there are `count` of them in a decode step or in the whole of prefill. A
    task `moves` bytes over its lane's link and takes `seconds`, given those bytes; `host_bytes` are what the CPU reads
    and writes in the host's memory meanwhile. What `attends` depends on the context and on the layer's window, what is
    `by_ffn` on whether the layer has experts. Only layers with experts on the CPU have tasks `of_cpu_experts`,
    only those whose experts stream in parts tasks `of_parts`, one for each, and only the model's last one those
    `of_last`. In what `reduces`, one of several ranks sums up with the others. `chained` tasks are those that every
    micro-batch or chunk goes through in turn. `ends_step` marks the act that chooses tokens.
    """

    letter: str
    name: str
    words: str
    phase: Phase
    lane: Lane
    touches: "Callable[[Pipeline, TaskId], Touch]" = lambda _, __: NOTHING
    count: "Callable[[Counts], Number]" = lambda _: 0
    moves: "Callable[[Load], Number]" = lambda _: 0
    seconds: "Callable[[Load, Number], Number]" = lambda _, __: 0.0
    host_bytes: "Callable[[Load], Number]" = lambda _: 0
    attends: bool = False
    by_ffn: bool = False
    of_cpu_experts: bool = False
    of_parts: bool = False
    of_last: bool = False
    of_pages: bool = False
    reduces: bool = False
    chained: bool = False
    ends_step: bool = False

    @property
    def computes(self) -> bool:
        """Whether a processor is busy with its tasks; in what `reduces` a rank waits for others."""
        return self.lane.computes and not self.reduces

    @property
    def by_residents(self) -> bool:
        """Whether its tasks depend on how many of a layer's experts are not on the GPU."""
        return self.of_pages or self.of_cpu_experts or self.of_parts


class TaskId(NamedTuple):
    """Names one task; prints as `B0.2`, or `B0.2@1` in the step after the first.

    `index` is that of the micro-batch in decode, of the chunk of prompts in prefill, and of the page for acts that move
    pages of weights; parts of experts are counted through all micro-batches or chunks of a layer. A tuple, as
    simulations make and look up several for every task.
    """

    act: Act
    layer: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride] - nobody looks for a place in it
    step: int = 0

    @property
    def phase(self) -> Phase:
        """The phase that the task belongs to; a graph may hold tasks of both."""
        return self.act.phase

    def __str__(self) -> str:
        """Letter, layer, index, and the step if it is not the first."""
        suffix = f"@{self.step}" if self.step else ""
        return f"{self.act.letter}{self.layer}.{self.index}{suffix}"


class Task(NamedTuple):
    """One piece of work, the tasks of other lanes that it waits for, and the parts of buffers that it touches."""

    id: TaskId
    after: tuple[TaskId, ...] = ()
    touch: Touch = NOTHING

    @property
    def lane(self) -> Lane:
        """The lane that the task runs in."""
        return self.id.act.lane

    def slot(self, buffer: Buffer) -> int:
        """The turn of the buffer that the task reads or writes; 0 if it does neither."""
        for parts in self.touch:
            for touched, slot, _, _ in parts:
                if touched is buffer:
                    assert isinstance(slot, int), buffer.name
                    return slot
        return 0


@dataclass(frozen=True, slots=True)
class TaskGraph:
    """Tasks in an order that is topological and is each lane's issue order."""

    tasks: tuple[Task, ...]

    def __post_init__(self) -> None:
        """Assert that every task is listed once and waits only for tasks listed before it."""
        listed: set[TaskId] = set()
        for task in self.tasks:
            assert task.id not in listed, f"{task.id} is listed twice"
            missing = [str(other) for other in task.after if other not in listed]
            assert not missing, f"{task.id} waits for {missing}, listed later or never"
            listed.add(task.id)

    def lane_text(self, lane: Lane) -> str:
        """The lane's tasks in issue order: `W0.0 W0.1 H0.0`."""
        return " ".join(str(task.id) for task in self.tasks if task.lane is lane)
