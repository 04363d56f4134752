"""What a run or a simulation did: one span a task, in seconds from the start."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, cast

import msgspec

from hrm.acts import act_named
from hrm.decoding import read_json_object
from hrm.errors import TraceError
from hrm.files import writing
from hrm.tasks import Lane, Phase, TaskId
from hrm.units import GIB

MAX_TRACE_BYTES: Final = 2 * GIB  # millions of spans
_LANES: Final = tuple(Lane)

_SPANS_AT_ONCE: Final = 1000
_CHARTED_SPANS: Final = 4000  # of a trace, at most: each costs a look


class Span(NamedTuple):
    """When a task ran; `num_bytes` is what it moved, 0 for computing.

    A tuple, as the executor makes one between any two tasks of a lane.
    """

    id: TaskId
    start_s: float
    end_s: float
    batch: int = 0
    num_bytes: int = 0

    @property
    def lane(self) -> Lane:
        """The lane that the task ran in."""
        return self.id.act.lane

    @property
    def phase(self) -> Phase:
        """The phase that the task belongs to."""
        return self.id.act.phase

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True)
class Trace:
    """Spans of one run or simulation; predicted and measured traces share this type."""

    spans: tuple[Span, ...]

    @property
    def makespan_s(self) -> float:
        """From the first start to the last end."""
        if not self.spans:
            return 0.0
        return max(s.end_s for s in self.spans) - min(s.start_s for s in self.spans)

    @property
    def num_layers(self) -> int:
        """How many layers there are tasks of, from the first one on."""
        return 1 + max((span.id.layer for span in self.spans), default=-1)

    @property
    def num_steps(self) -> int:
        """How many steps of decode there are tasks of, from the first one on."""
        return 1 + max((span.id.step for span in self.spans), default=-1)

    def of_phase(self, phase: Phase) -> "Trace":
        """Only the spans of one phase."""
        return Trace(tuple(span for span in self.spans if span.phase is phase))

    def of_batch(self, batch: int) -> "Trace":
        """Only the spans of one batch."""
        return Trace(tuple(span for span in self.spans if span.batch == batch))

    def up_to_layer(self, layers: int) -> "Trace":
        """What had ended when the first step was done with its first `layers` layers."""
        of_them = [s.end_s for s in self.spans if s.id.layer < layers and s.id.step == 0]
        end_s = max(of_them, default=0.0)
        return Trace(tuple(span for span in self.spans if span.end_s <= end_s))

    def busy_s(self) -> dict[Lane, float]:
        """Seconds each lane was at work."""
        busy: dict[Lane, float] = defaultdict(float)
        for span in self.spans:
            busy[span.lane] += span.seconds
        return dict(busy)

    def utilisation(self) -> dict[Lane, float]:
        """Busy share of the makespan of each lane."""
        makespan_s = self.makespan_s
        return {lane: busy_s / makespan_s for lane, busy_s in self.busy_s().items()}

    def seconds_by_kind(self) -> dict[str, float]:
        """Total seconds of each kind of task, by its name."""
        totals: dict[str, float] = defaultdict(float)
        for span in self.spans:
            totals[span.id.act.name] += span.seconds
        return dict(totals)


def lane_chart(trace: Trace, *, width: int = 100) -> str:
    """Draw a trace as text, one row a lane; each cell holds the letter that was busiest in it.

    The letter is small if the lane was busy for less than half of the cell, and a dot if it was
    idle. An empty trace gives an empty text.
    """
    spans = trace.spans[:_CHARTED_SPANS]
    if not spans:
        return ""
    start_s, end_s = min(s.start_s for s in spans), max(s.end_s for s in spans)
    cell_s = max((end_s - start_s) / width, 1e-12)
    rows: list[str] = []
    for lane in Lane:
        cells: list[dict[str, float]] = [defaultdict(float) for _ in range(width)]
        for span in (s for s in spans if s.lane is lane):
            first = int((span.start_s - start_s) / cell_s)
            last = min(int((span.end_s - start_s) / cell_s), width - 1)
            for cell in range(first, last + 1):
                left_s, right_s = start_s + cell * cell_s, start_s + (cell + 1) * cell_s
                overlap_s = min(span.end_s, right_s) - max(span.start_s, left_s)
                cells[cell][span.id.act.letter] += max(overlap_s, 0.0)
        if any(cells):
            text = "".join(_busiest(cell, cell_s) for cell in cells)
            rows.append(f"{lane.value:>5} │{text}│")
    return "\n".join(rows)


def _busiest(cell: dict[str, float], cell_s: float) -> str:
    busy_s = sum(cell.values())
    if busy_s < 0.05 * cell_s:
        return "·"
    letter = max(cell, key=lambda letter: cell[letter])
    return letter if busy_s >= 0.5 * cell_s else letter.lower()


def chrome_events(spans: Iterable[Span], *, process: str = "measured", pid: int = 0) -> list[dict[str, object]]:
    """Spans as Chrome trace events (microseconds), one thread a lane; Perfetto opens them."""
    lanes = list(Lane)
    names: list[dict[str, object]] = [
        {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": process}},
        *(
            {"ph": "M", "name": "thread_name", "pid": pid, "tid": index, "args": {"name": lane}}
            for index, lane in enumerate(lanes)
        ),
    ]
    return names + [
        {
            "ph": "X",
            "name": str(span.id),
            "cat": span.phase.value,
            "pid": pid,
            "tid": lanes.index(span.lane),
            "ts": round(span.start_s * 1e6, 3),
            "dur": round(span.seconds * 1e6, 3),
            "args": {
                "kind": span.id.act.name,
                "layer": span.id.layer,
                "micro_batch": span.id.index,
                "step": span.id.step,
                "batch": span.batch,
                "num_bytes": span.num_bytes,
            },
        }
        for span in spans
    ]


def write_chrome_trace(path: Path, *, measured: Trace | None = None, **others: Trace) -> None:
    """Write traces side by side into one Chrome trace file; TraceError if it cannot be written."""
    traces = {**({"measured": measured} if measured else {}), **others}
    with writing(path, TraceError, remedy="choose another --trace") as write:
        for piece in _chrome_pieces(traces):
            write(piece.encode())


def _chrome_pieces(traces: dict[str, Trace]) -> Iterator[str]:
    """The text of a Chrome trace, in pieces that take little memory."""
    yield '{"displayTimeUnit": "ms", "traceEvents": [\n'
    for pid, (name, trace) in enumerate(traces.items()):
        names = chrome_events((), process=name, pid=pid)
        yield (",\n" if pid else "") + ",\n".join(json.dumps(event) for event in names)
        for first in range(0, len(trace.spans), _SPANS_AT_ONCE):
            spans = trace.spans[first : first + _SPANS_AT_ONCE]
            events = chrome_events(spans, process=name, pid=pid)[len(names) :]
            yield "".join(f",\n{json.dumps(event)}" for event in events)
    yield "\n]}\n"


_Index = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
_Microseconds = Annotated[float, msgspec.Meta(ge=0, le=1e15)]


class _Arguments(msgspec.Struct):
    """What an event says of its task."""

    kind: str
    layer: _Index
    micro_batch: _Index
    step: _Index
    batch: _Index
    num_bytes: Annotated[int, msgspec.Meta(ge=0)]


class _Event(msgspec.Struct):
    """A span as it stands in the file."""

    tid: Annotated[int, msgspec.Meta(ge=0, lt=len(Lane))]
    ts: _Microseconds
    dur: _Microseconds
    cat: Phase
    args: _Arguments


def _span(event: _Event) -> Span:
    args = event.args
    return Span(
        TaskId(act_named(event.cat, args.kind, _LANES[event.tid]), args.layer, args.micro_batch, args.step),
        event.ts / 1e6,
        (event.ts + event.dur) / 1e6,
        args.batch,
        args.num_bytes,
    )


def read_chrome_trace(path: Path, *, process: str = "measured") -> Trace:
    """Read a trace that `write_chrome_trace` wrote; TraceError if the file is none of ours."""
    what, remedy = "a trace written by executor", "run the job again"
    document = read_json_object(path, what, TraceError, remedy=remedy, max_bytes=MAX_TRACE_BYTES)
    try:
        events = cast("list[Any]", document["traceEvents"])
        pids = [e["pid"] for e in events if e["name"] == "process_name" and e["args"]["name"] == process]
        ours = [event for event in events if event["ph"] == "X" and event["pid"] in pids]
        spans = tuple(_span(event) for event in msgspec.convert(ours, list[_Event]))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise TraceError(str(path), f"<{type(error).__name__}: {error}>", f"must be {what}", remedy) from error
    return Trace(spans)
