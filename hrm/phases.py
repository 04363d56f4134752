"""The tasks of a phase with their bytes and seconds, and how long the phase takes when they are simulated."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from math import inf
from operator import itemgetter
from typing import Final, NamedTuple

from hrm.contention import ALONE, Stretch
from hrm.costs import Costs, TaskSeconds, TaskWork
from hrm.phase_work import PhaseWork, prefill_phase, step_work
from hrm.policy import Policy, ScheduleName
from hrm.schedules import Pipeline, decode_pipeline, iter_positions, iter_tasks, prefill_pipeline
from hrm.shortened import shortened
from hrm.simulate import Order, end_times, in_order, simulate
from hrm.tasks import Phase
from hrm.trace import Trace
from hrm.workload import Workload

MAX_TASKS: Final = 350  # of longer graphs fewer layers are simulated
_OF_DECODE: Final = 3  # times fewer are enough of a decode step, whose layers follow one another without an end
MAX_CHUNKS: Final = 125  # that are simulated; of more, each stands for several
_MAX_TASKS_A_LAYER: Final = 2000  # of prefill: chunks with more are fewer
_MIN_CHUNKS: Final = 16
MAX_MICRO_BATCHES: Final = 512  # that are simulated; of more, each stands for several
_TASKS_A_MICRO_BATCH: Final = 8  # of a decode step, in each layer
_TASKS_A_CHUNK: Final = 6  # of prefill, in each layer
_STEPS: Final = 3  # of which the one that is timed, between the same layer of two, has others before and after it
_WARM_LAYER: Final = 2  # at whose end the first step is like all others
_SHORT: Final = 4000  # tasks about of a graph whose order is kept
_ACT_AND_LAYER: Final = itemgetter(0, 1)  # of a task: those that share both take equally long
_Known = dict[int, TaskSeconds]  # of the distinct tasks of a work, by their number, what holds in any context


def decode_work(
    costs: Costs,
    policy: Policy,
    context: float,
    *,
    num_steps: int,
    tokens: float | None = None,
    shape: Policy | None = None,
    stretch: Stretch | None = None,
) -> TaskWork:
    """Bytes and seconds of the tasks of `num_steps` decode steps at a mean context.

    `tokens` is the mean number of active requests in a micro-batch; by default they all are. The
    tasks are those of `shape`, if it is given: the same policy over fewer micro-batches. The `stretch`
    is that of steps that are simulated, unless it is known.
    """
    tokens = policy.batch_size / policy.num_micro_batches if tokens is None else tokens
    if stretch is None:
        [(stretch, _)] = _steps(costs, policy, {context: _step_work(costs, policy, context, tokens)}, tokens)
    return TaskWork(
        costs=costs,
        policy=policy,
        pipeline=decode_pipeline(costs.spec, shape or policy, num_steps=num_steps),
        tokens=tokens,
        context=context,
        stretch=stretch,
    )


def prefill_work(
    costs: Costs,
    policy: Policy,
    workload: Workload,
    *,
    shape: Policy | None = None,
    max_chunks: float = inf,
    stretch: Stretch | None = None,
) -> TaskWork:
    """Bytes and seconds of the tasks of one batch's prefill.

    The tasks are those of `shape`, if it is given, and of at most `max_chunks` chunks; each chunk
    is of as many tokens as if there were all of them. The `stretch` is that of prefill when it is
    simulated, unless it is known.
    """
    tokens = policy.batch_size * workload.prompt_len
    num_chunks = int(workload.chunks(policy.batch_size, policy.prefill_chunk_tokens))
    if stretch is None:
        stretch, _ = _prefill(costs, policy, workload, prefill_phase(costs, policy, workload))
    return TaskWork(
        costs=costs,
        policy=policy,
        pipeline=prefill_pipeline(costs.spec, shape or policy, num_chunks=int(min(num_chunks, max_chunks))),
        tokens=tokens / num_chunks,
        context=workload.prompt_len,
        requests_per_chunk=policy.batch_size / num_chunks,
        stretch=stretch,
    )


def simulate_work(work: TaskWork) -> Trace:
    """The trace of a phase whose tasks take their predicted seconds."""
    tasks = iter_tasks(work.pipeline, work.policy.schedule)
    return simulate(tasks, work.seconds_of(), work.costs.hand_over_s, work.costs.shared_cores)


def step_seconds(costs: Costs, policy: Policy, context: float, *, tokens: float | None = None) -> float:
    """Simulated seconds of one decode step in the steady state, at a mean context.

    `tokens` is the mean number of active requests in a micro-batch; by default they all are.
    """
    tokens = policy.batch_size / policy.num_micro_batches if tokens is None else tokens
    return steps_seconds(costs, policy, {context: _step_work(costs, policy, context, tokens)}, tokens=tokens)[0]


def _step_work(costs: Costs, policy: Policy, context: float, tokens: float) -> PhaseWork:
    return step_work(costs, policy, context, active_share=tokens * policy.num_micro_batches / policy.batch_size)


def steps_seconds(costs: Costs, policy: Policy, works: Mapping[float, PhaseWork], *, tokens: float) -> list[float]:
    """The same at each of some mean contexts, of which the work in closed form is known.

    Of very many micro-batches, each that is simulated stands for several.
    """
    return [seconds for _, seconds in _steps(costs, policy, works, tokens)]


def _steps(
    costs: Costs, policy: Policy, works: Mapping[float, PhaseWork], tokens: float
) -> list[tuple[Stretch, float]]:
    """How far tasks are stretched in steps, and how long these take."""
    shape, in_one, pages_in_one = _simulated_shape(policy)
    known: _Known = {}

    def of_context(context: float, closed: PhaseWork) -> tuple[Stretch, float]:
        walks = _Walks(replace(short.work, context=context), in_one, pages_in_one, known)

        def seconds(stretch: Stretch) -> float:
            walk = walks.stretched(stretch)
            steady_s = walk.layer_end_s(warm, step=1) - walk.layer_end_s(warm)
            return steady_s + short.left_out_s(lambda layer: walk.layer_s(layer, step=int(layer <= warm)))

        return closed.contention.settled(seconds, closed.stretched_s)

    first = next(iter(works), 0.0)
    work = decode_work(costs, policy, first, num_steps=_STEPS, tokens=tokens, shape=shape, stretch=ALONE)
    short = shortened(work, MAX_TASKS / _OF_DECODE / _tasks_a_layer(work.pipeline))
    warm = _warm_layer(short.work.pipeline)
    return [of_context(context, closed) for context, closed in works.items()]


def prefill_seconds(costs: Costs, policy: Policy, workload: Workload, *, work: PhaseWork | None = None) -> float:
    """Simulated seconds of one batch's prefill; of very many chunks, each stands for several.

    Its `work` in closed form is worked out unless it is known.
    """
    return _prefill(costs, policy, workload, prefill_phase(costs, policy, workload) if work is None else work)[1]


def _prefill(costs: Costs, policy: Policy, workload: Workload, closed: PhaseWork) -> tuple[Stretch, float]:
    """How far tasks are stretched in prefill, and how long it takes."""
    shape, _, pages_in_one = _simulated_shape(policy)
    tasks_a_chunk = _TASKS_A_CHUNK + _tasks_of_parts(policy.parts(costs.spec, Phase.PREFILL))
    affordable = min(MAX_CHUNKS, max(_MIN_CHUNKS, _MAX_TASKS_A_LAYER // tasks_a_chunk))
    work = prefill_work(costs, policy, workload, shape=shape, max_chunks=affordable, stretch=ALONE)
    in_one = float(workload.chunks(policy.batch_size, policy.prefill_chunk_tokens)) / work.pipeline.num_micro_batches
    tasks_a_layer = tasks_a_chunk * work.pipeline.num_micro_batches
    tasks_a_layer += work.pipeline.num_pages * any(work.pipeline.streamed)
    short = shortened(work, MAX_TASKS / tasks_a_layer)
    walks = _Walks(short.work, in_one, pages_in_one, {})

    def seconds(stretch: Stretch) -> float:
        walk = walks.stretched(stretch)
        return max(walk.end_s) + short.left_out_s(walk.layer_s)

    return closed.contention.settled(seconds, closed.stretched_s)


def _tasks_a_layer(pipeline: Pipeline) -> int:
    """About how many tasks a step has in a layer, or at most prefill."""
    of_each = _TASKS_A_MICRO_BATCH * max(pipeline.num_micro_batches, pipeline.num_pages)
    return of_each + pipeline.num_micro_batches * _tasks_of_parts(pipeline.parts)


def _tasks_of_parts(parts: Sequence[int]) -> int:
    """How many tasks load and compute so many parts of a layer's experts, for one micro-batch or chunk; of the most."""
    return 2 * max(parts, default=0)


def _simulated_shape(policy: Policy) -> tuple[Policy, float, float]:
    """The policy over what is simulated of many micro-batches and pages, and how many each of both stands for.

    This is no smaller batch: the few stand for all, so as large a share of their caches is on the GPU.
    """
    number, pages = policy.num_micro_batches, policy.num_weight_pages
    few, few_pages = min(number, MAX_MICRO_BATCHES), min(pages, MAX_MICRO_BATCHES)
    if (few, few_pages) == (number, pages):
        return policy, 1.0, 1.0
    shape = replace(
        policy,
        batch_size=min(policy.batch_size, few * policy.micro_batch_size),
        gpu_kv_micro_batches=policy.gpu_kv_micro_batches * few // number,
        weight_pages=few_pages,
    )
    return shape, number / few, pages / few_pages


class _Walk(NamedTuple):
    """The order of a phase's tasks, and when each ends."""

    order: Order
    end_s: Sequence[float]

    def layer_end_s(self, layer: int, step: int = 0) -> float:
        """When all micro-batches or chunks have gone through a layer."""
        return self.end_s[self.order.layer_ends[step, layer]]

    def layer_s(self, layer: int, step: int = 0) -> float:
        """How long after the layer before it."""
        return self.layer_end_s(layer, step) - self.layer_end_s(layer - 1, step)


class _Walks:
    """The tasks of a phase, walked with one stretch or another; quicker than `simulate_work`.

    A micro-batch or chunk of the work stands for `in_one` of them, and so takes that much longer; a
    page of weights for `pages_in_one` smaller ones, if there are several. What is `known` is of works
    that differ from this one in their context only; what is worked out joins it.
    """

    def __init__(self, work: TaskWork, in_one: float, pages_in_one: float, known: _Known) -> None:
        pipeline = work.pipeline
        pages_in_one = pages_in_one if pipeline.num_pages > 1 else 1.0
        self._hand_over_s, self._shared = work.costs.hand_over_s, work.costs.shared_cores
        self._order = _order(pipeline, work.policy.schedule, whole=self._shared is not None)
        pages = round(pipeline.num_pages * pages_in_one)
        if pages != pipeline.num_pages:
            work = replace(work, pipeline=replace(pipeline, num_pages=pages))
        alone_of, self._alone = work.alone(), list[TaskSeconds]()
        for number, task_id in enumerate(self._order.distinct):
            of_task = known.get(number)
            if of_task is None:
                times = pages_in_one if task_id.act.of_pages else in_one
                alone_s, at_memory_s = alone_of(task_id)
                of_task = TaskSeconds(times * alone_s, times * at_memory_s)
                if not task_id.act.attends:
                    known[number] = of_task
            self._alone.append(of_task)
        self._walked: tuple[list[float], _Walk] | None = None

    def stretched(self, stretch: Stretch) -> _Walk:
        """When tasks end; the last walk again, where no task is stretched any further."""
        distinct = zip(self._order.distinct, self._alone, strict=True)
        seconds = [stretch.seconds(task_id.act, *alone) for task_id, alone in distinct]
        if self._walked is None or self._walked[0] != seconds:
            ends = end_times(self._order, seconds, self._hand_over_s, self._shared)
            self._walked = seconds, _Walk(self._order, ends)
        return self._walked[1]


def _order(pipeline: Pipeline, schedule: ScheduleName, *, whole: bool) -> Order:
    """The order of a pipeline's tasks, which other contexts, costs, machines and searches ask for again.

    Unless it is asked for as a `whole`, it ends where the step does that is timed.
    """
    if not any(pipeline.streamed):
        pipeline = replace(pipeline, num_pages=1, dense_pages=0)
    is_short = pipeline.num_layers * _tasks_a_layer(pipeline) <= _SHORT
    return (_short_order if is_short else _long_order)(pipeline, schedule, whole)


def _new_order(pipeline: Pipeline, schedule: ScheduleName, whole: bool) -> Order:  # noqa: FBT001 - a key of caches
    tasks = iter_positions(pipeline, schedule)
    if whole or pipeline.phase is Phase.PREFILL:  # on shared cores what comes later delays what is under way
        return in_order(tasks, _ACT_AND_LAYER)
    until = 1, _warm_layer(pipeline)
    return in_order(tasks, _ACT_AND_LAYER, until=until, micro_batches=pipeline.num_micro_batches)


def _warm_layer(pipeline: Pipeline) -> int:
    """The layer at whose end lanes wait for one another as in every step."""
    return min(_WARM_LAYER, pipeline.num_layers - 1)


# A hundred megabytes at most, and two of each phase of one policy.
_short_order = lru_cache(maxsize=128)(_new_order)
_long_order = lru_cache(maxsize=4)(_new_order)
