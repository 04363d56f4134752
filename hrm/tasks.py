"""The vocabulary of schedules: lanes, task kinds, tasks and the graph that they form.

A task is inert data. List order in a graph is topological and is each lane's issue order, so
neither the simulator nor the executor can deadlock.
"""

from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import NamedTuple


class Lane(StrEnum):
    """What works in order: a CUDA stream or a thread."""

    GPU = "GPU"
    CPU = "CPU"
    H2D = "H2D"
    D2H = "D2H"
    STAGE = "STAGE"

    __hash__ = str.__hash__  # Enum would hash the name in Python, and simulations hash a lot


class Device(StrEnum):
    """Where data lies or work is done: the top level's processor or the host's."""

    GPU = "gpu"
    CPU = "cpu"


class Phase(StrEnum):
    """The two phases of generating from a batch of prompts."""

    PREFILL = "prefill"
    DECODE = "decode"


class TaskKind(Enum):
    """What a task does; the value is the letter that it prints as."""

    EMBED = "E"  # token embeddings gathered on the host and moved to the GPU
    PRE_ATTENTION = "A"  # norm, query, key and value projections, rotary embedding
    OFFLOAD_QKV = "Q"  # queries, keys and values of the new tokens to the host
    LOAD_KV = "K"  # a micro-batch's KV cache of one layer to the GPU
    STORE_KV = "V"  # new keys and values to the host
    ATTENTION = "B"  # attention over the KV cache, on either device
    LOAD_HIDDEN = "H"  # attention output (decode) or hidden states (prefill) to the GPU
    POST_ATTENTION = "C"  # output projection, norm, router, and the experts on the GPU
    OFFLOAD_TOKENS = "X"  # normed tokens and their routing to the host
    CPU_EXPERTS = "F"  # experts that stay on the host, computed there
    LOAD_EXPERT_OUTPUT = "Y"  # their output to the GPU
    LOAD_PAGE = "W"  # one page of a layer's weights to the GPU
    STAGE_PAGE = "S"  # one page of weights from pageable to pinned host memory
    PREFILL_LAYER = "P"  # one whole layer over a chunk of prompts
    STORE_HIDDEN = "O"  # hidden states of a chunk of prompts to the host
    SAMPLE = "L"  # final norm, LM head, and the choice of the next token

    __hash__ = object.__hash__  # members are singletons; Enum would hash their names in Python


class TaskId(NamedTuple):
    """Names one task; prints as `B0.2`, or `B0.2@1` in the step after the first.

    `micro_batch` is the page for LOAD_PAGE and STAGE_PAGE and the chunk of prompts in prefill.
    A tuple, as simulations make and look up several for every task.
    """

    kind: TaskKind
    layer: int
    micro_batch: int
    step: int = 0

    def __str__(self) -> str:
        """Letter, layer, micro-batch, and the step if it is not the first."""
        suffix = f"@{self.step}" if self.step else ""
        return f"{self.kind.value}{self.layer}.{self.micro_batch}{suffix}"


class Task(NamedTuple):
    """One piece of work in a lane, and the tasks it waits for (data and buffer reuse)."""

    id: TaskId
    lane: Lane
    after: tuple[TaskId, ...] = ()


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
