"""Tasks of decode that native kernels alone do, done again by one call in later steps."""

from collections.abc import Callable
from typing import Final, final

from executor.handlers.state import BatchState, Rows
from executor.model import Architecture
from executor.native import kernels
from executor.native.tape import Numbers, Tape
from hrm.acts.decode import KV_BUFFERS, POST_ATTENTION
from hrm.acts.pages import WEIGHTS
from hrm.schedules import Pipeline
from hrm.tasks import Task

TapedWork = Callable[[Task, Rows, slice], int]

MOST_TAPES: Final = 4096  # of an act; each keeps the addresses of a layer's experts

_Key = tuple[int, int, int, int]


@final
class Tapes:
    """Records the tasks of one batch; a task whose tape is there, of as many requests, is played.

    What a task of a layer and micro-batch is given lies at the same places in every step, but for weights and caches
    that come into buffers in turn. Of as many requests it is first done without a tape: of a batch whose requests end
    one after the other none would ever be played. `weights_move` says whether any weights come to slots.
    """

    def __init__(self, arch: Architecture, pipeline: Pipeline, state: BatchState, *, weights_move: bool) -> None:
        self._pipeline, self._state, self._weights_move = pipeline, state, weights_move
        reaches = list(arch.reaches)
        self._reach_of = [reaches.index(layer.mixer.reach) for layer in arch.layers]
        self._numbers: dict[int, tuple[Rows, list[Numbers]]] = {}

    def taped(self, work: TapedWork) -> TapedWork:
        """The same work, which moves nothing over a link."""
        if kernels() is None:
            return work
        tapes = dict[_Key, tuple[int, Tape]]()
        seen, spoiled = dict[_Key, int](), dict[_Key, int]()

        def handle(x: Task, rows: Rows, span: slice) -> int:
            key, count = self._key(x), len(rows.sequences)
            of_count, tape = tapes.get(key, (0, None))
            if tape is not None and of_count == count:
                self._play(tape, x, rows)
            elif seen.get(key) != count or spoiled.get(key) == count or len(tapes) >= MOST_TAPES:
                seen[key] = count
                work(x, rows, span)
            elif (made := Tape.record(lambda: work(x, rows, span), self._numbers_of(x, rows))) is not None:
                tapes[key] = count, made
            else:
                spoiled[key] = count
            return 0

        return handle

    def _key(self, x: Task) -> _Key:
        """What tells where the task finds everything."""
        _, layer, index, _ = x.id
        weights = x.slot(WEIGHTS) if self._weights_move else 0
        return layer, index, weights, x.slot(KV_BUFFERS) if self._pipeline.streams_kv(index) else 0

    def _play(self, tape: Tape, x: Task, rows: Rows) -> None:
        counts, layer = tape.play(self._numbers_of(x, rows)), x.id.layer
        # Where the CPU computes some of a layer's experts, it is there that all are counted.
        if counts and not (x.id.act is POST_ATTENTION and self._pipeline.cpu_experts[layer]):
            self._state.count_routed(layer, counts)

    def _numbers_of(self, x: Task, rows: Rows) -> Numbers:
        made = self._numbers.get(x.id.index)
        if made is None or made[0] is not rows:
            each = (Numbers(n.positions_R, n.cache_rows_R, n.starts, n.lengths) for n in rows.numbers.values())
            made = self._numbers[x.id.index] = rows, list(each)
        return made[1][self._reach_of[x.id.layer]]
