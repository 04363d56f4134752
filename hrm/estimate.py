"""What a policy will do on a machine: closed form (the bound) and simulation (with its bubbles)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from math import ceil, inf
from typing import Final

from hrm.acts import decode, prefill
from hrm.causes import Limits, limits_of
from hrm.closed_form import DecodeStep, PhaseSeconds, Point, whole_prefill
from hrm.costs import EXECUTOR, Costs, LayerMix, Runtime, TaskWork
from hrm.hardware import HardwareProfile
from hrm.latency import Latency
from hrm.memory import MemoryPlan, plan_memory
from hrm.model_spec import ModelSpec
from hrm.parallel import Part, part_for
from hrm.phase_work import PhaseWork, Turn, decode_steps, prefill_phase
from hrm.policy import PaperTuple, Parallelism, Policy, ScheduleName
from hrm.schedules import Pipeline, decode_pipeline, iter_tasks, prefill_pipeline
from hrm.simulate import Order, end_times, in_order, simulate
from hrm.tasks import Act, Lane, TaskId
from hrm.trace import Trace
from hrm.workload import Workload

# Longer graphs are simulated over fewer layers and carried on in proportion: layers are alike.
MAX_TASKS: Final = 3000
MIN_LAYERS: Final = 4  # that are simulated, however many micro-batches there are
MAX_MICRO_BATCHES: Final = 512  # that are simulated; of more, each stands for several
_TASKS_A_CHUNK: Final = 6  # of prefill, in each layer
_PAGES: Final = frozenset({decode.LOAD_PAGE, decode.STAGE_PAGE, prefill.LOAD_PAGE, prefill.STAGE_PAGE})
STEADY_STEPS: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseEstimate:
    """One phase of the whole job: simulated seconds, and its work in closed form."""

    seconds: float
    work: PhaseWork

    @property
    def bound_s(self) -> float:
        """Seconds if all lanes overlapped perfectly."""
        return self.work.bound_s

    @property
    def lane_s(self) -> dict[Lane, float]:
        """Seconds of work in each lane."""
        return self.work.lane_s

    @property
    def host_memory_s(self) -> float:
        """Seconds that the host's memory needs to serve all lanes."""
        return self.work.host_memory_s

    @property
    def all_reduce_s(self) -> float:
        """Seconds of the GPUs' time in which they exchange sums."""
        return self.work.all_reduce_s


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A policy's predicted job: all batches of the workload, or one batch if it has no end.

    `part` is what the policy is for, the whole or one pipeline stage: shares of a policy are told
    here, of its own part. `turns` are the batches that the job's time consists of.
    `latency` is of a full batch's requests, in the policy's part of the machine.
    """

    policy: Policy
    part: Part
    runtime: Runtime
    workload: Workload
    turns: tuple[Turn, ...]
    num_requests: int
    num_batches: int
    generated_tokens: float
    prefill: PhaseEstimate
    decode: PhaseEstimate
    memory: MemoryPlan
    latency: Latency

    @property
    def seconds(self) -> float:
        """Predicted time of the job."""
        return self.prefill.seconds + self.decode.seconds

    @property
    def tokens_per_s(self) -> float:
        """Generation throughput: tokens generated over prefill and decode time."""
        return self.generated_tokens / self.seconds

    @property
    def bound_tokens_per_s(self) -> float:
        """Throughput if all lanes overlapped perfectly."""
        return self.generated_tokens / (self.prefill.bound_s + self.decode.bound_s)

    @property
    def paper_tuple(self) -> PaperTuple:
        """The policy in the paper's six numbers."""
        return self.policy.paper_tuple(self.part.spec)

    @property
    def weight_share_on_gpu(self) -> float:
        """The paper's r_w: share of the layers' weight bytes that lives on the GPU."""
        return self.policy.weight_share_on_gpu(self.part.spec)

    @property
    def costs(self) -> Costs:
        """What the tasks of the policy's part cost."""
        return Costs(self.part.spec, self.part.profile, self.policy.formats, self.runtime)

    @cached_property
    def limits(self) -> Limits:
        """What limits each phase, and the job; worked out when it is first asked for."""

        def seconds_of(costs: Costs) -> tuple[float, float]:
            predicted = self if costs == self.costs else self.changed(costs)
            return predicted.prefill.seconds, predicted.decode.seconds

        return limits_of(self.costs, self.turns, self.workload, seconds_of=seconds_of)

    def changed(self, costs: Costs) -> "Estimate":
        """The same job under the same policy where tasks cost something else."""
        batches = [_batch(costs, turn.policy, self.workload) for turn in self.turns]
        prefill, decode = _total(self.turns, batches)
        return replace(
            self, part=Part(costs.spec, costs.profile), runtime=costs.runtime, prefill=prefill, decode=decode
        )


def estimate(
    spec: ModelSpec, policy: Policy, profile: HardwareProfile, workload: Workload, *, runtime: Runtime = EXECUTOR
) -> Estimate:
    """Predict a job under a policy.

    In pipeline parallel as many batches are under way as there are stages: a job of fewer takes as
    long as if it had as many. Raises PolicyError if the policy is not for this model; whether it
    fits is for the caller to check (`estimate(...).memory.check_fits()`).
    """
    part = part_for(policy, spec, profile)
    costs = Costs(part.spec, part.profile, policy.formats, runtime)
    requests = workload.requests_or(policy.batch_size)
    turns: tuple[Turn, ...] = (Turn(policy, 1.0),)
    if workload.num_requests is not None:
        pipeline = policy.parallelism is Parallelism.PIPELINE
        turns = _turns(policy, requests, profile.num_gpus if pipeline else 1)
    batches = [_batch(costs, turn.policy, workload) for turn in turns]
    prefill, decode = _total(turns, batches)
    return Estimate(
        policy=policy,
        part=part,
        runtime=runtime,
        workload=workload,
        turns=turns,
        num_requests=requests,
        num_batches=ceil(requests / policy.batch_size),
        generated_tokens=requests * workload.generated_tokens,
        prefill=prefill,
        decode=decode,
        memory=plan_memory(spec, policy, profile),
        latency=_latency(costs, turns[0].policy, workload, *batches[0]),
    )


def _latency(
    costs: Costs, policy: Policy, workload: Workload, prefill: PhaseEstimate, decode: PhaseEstimate
) -> Latency:
    """What requests of a batch with these phases wait for."""
    tokens = policy.batch_size * workload.prompt_len
    return Latency.of_batch(
        prefill_s=prefill.seconds,
        gpu_s_a_layer=prefill.lane_s[Lane.GPU] / costs.spec.num_layers,
        chunks=ceil(tokens / policy.prefill_chunk_tokens),
        decode_s=decode.seconds,
        decode_steps=workload.decode_steps,
        num_stages=costs.profile.num_stages,
    )


def _turns(policy: Policy, requests: int, num_stages: int) -> tuple[Turn, ...]:
    """Batches by size, each as often as the job takes its time.

    The batches that go through a pipeline together take as long as if each were the largest of
    them, and as if there were one for every stage.
    """
    full, rest = divmod(requests, policy.batch_size)
    turns = [Turn(policy, float(ceil(full / num_stages) * num_stages))] if full else []
    if rest and full % num_stages == 0:  # else it goes with full ones, of which some are missing
        turns.append(Turn(policy.for_batch(rest), float(num_stages)))
    return tuple(turns)


def _batch(costs: Costs, policy: Policy, workload: Workload) -> tuple[PhaseEstimate, PhaseEstimate]:
    """Both phases of one batch."""
    active = workload.active_share * policy.batch_size / policy.num_micro_batches
    decodes: list[tuple[float, PhaseWork]] = []
    decode_s = 0.0
    for context, steps, work in decode_steps(costs, policy, workload):
        simulated_s = step_seconds(costs, policy, context, tokens=active)
        # A model of one layer is not yet in its steady state when the steps are taken.
        decode_s += steps * max(work.bound_s, simulated_s)
        decodes.append((steps, work))
    return (
        PhaseEstimate(seconds=prefill_seconds(costs, policy, workload), work=prefill_phase(costs, policy, workload)),
        PhaseEstimate(seconds=decode_s, work=PhaseWork.total(decodes)),
    )


def _total(
    turns: Sequence[Turn], batches: Sequence[tuple[PhaseEstimate, PhaseEstimate]]
) -> tuple[PhaseEstimate, PhaseEstimate]:
    """Both phases of a job whose turns have these batches."""

    def over(phases: Sequence[PhaseEstimate]) -> PhaseEstimate:
        times = [turn.times for turn in turns]
        return PhaseEstimate(
            seconds=sum(count * phase.seconds for count, phase in zip(times, phases, strict=True)),
            work=PhaseWork.total((count, phase.work) for count, phase in zip(times, phases, strict=True)),
        )

    return over([prefill for prefill, _ in batches]), over([decode for _, decode in batches])


def decode_work(
    costs: Costs,
    policy: Policy,
    context: float,
    *,
    num_steps: int,
    tokens: float | None = None,
    shape: Policy | None = None,
) -> TaskWork:
    """Bytes and seconds of the tasks of `num_steps` decode steps at a mean context.

    `tokens` is the mean number of active requests in a micro-batch; by default they all are. The
    tasks are those of `shape`, if it is given: the same policy over fewer micro-batches.
    """
    whole = policy.batch_size / policy.num_micro_batches
    tokens = whole if tokens is None else tokens
    point = Point.of_policy(policy, costs.spec)
    step = DecodeStep.of_point(costs, point, policy.schedule, tokens / whole)
    return TaskWork(
        costs=costs,
        policy=policy,
        pipeline=decode_pipeline(costs.spec, shape or policy, num_steps=num_steps),
        tokens=tokens,
        context=context,
        stretch=_stretch(step.seconds(context)),
    )


def prefill_work(
    costs: Costs, policy: Policy, workload: Workload, *, shape: Policy | None = None, max_chunks: float = inf
) -> TaskWork:
    """Bytes and seconds of the tasks of one batch's prefill.

    The tasks are those of `shape`, if it is given, and of at most `max_chunks` chunks; each chunk
    is of as many tokens as if there were all of them.
    """
    tokens = policy.batch_size * workload.prompt_len
    num_chunks = ceil(tokens / policy.prefill_chunk_tokens)
    point = Point.of_policy(policy, costs.spec)
    return TaskWork(
        costs=costs,
        policy=policy,
        pipeline=prefill_pipeline(costs.spec, shape or policy, num_chunks=int(min(num_chunks, max_chunks))),
        tokens=tokens / num_chunks,
        context=workload.prompt_len,
        requests_per_chunk=policy.batch_size / num_chunks,
        stretch=_stretch(whole_prefill(costs, point, workload)),
    )


def _stretch(seconds: PhaseSeconds) -> float:
    """How much longer work on the host's memory takes because all of it wants more than there is.

    Only as far as the memory is what limits the phase: until then, work can give way in turn.
    """
    lanes, host_memory_s = seconds.of_lanes
    if host_memory_s <= max(lanes.values()):
        return 1.0
    using = max(seconds for lane, seconds in lanes.items() if lane is not Lane.GPU)
    return host_memory_s / using if using else 1.0


def simulate_work(work: TaskWork) -> Trace:
    """The trace of a phase whose tasks take their predicted seconds."""
    tasks = iter_tasks(work.pipeline, work.policy.schedule)
    return simulate(tasks, work.seconds_of())


def step_seconds(costs: Costs, policy: Policy, context: float, *, tokens: float | None = None) -> float:
    """Simulated seconds of one decode step in the steady state, at a mean context.

    `tokens` is the mean number of active requests in a micro-batch; by default they all are. Of
    very many micro-batches, each that is simulated stands for several.
    """
    shape, in_one, pages_in_one = _simulated_shape(policy)

    def seconds(work: TaskWork) -> float:
        order, end_s = _walked(work, in_one, pages_in_one)
        ends = [0.0] * STEADY_STEPS
        for position, step in order.samples:
            ends[step] = max(ends[step], end_s[position])
        # The last step loads no weights for another, so the step before it is the steady one.
        return ends[-2] - ends[-3]

    work = decode_work(costs, policy, context, num_steps=STEADY_STEPS, tokens=tokens, shape=shape)
    parts = max(shape.num_micro_batches, work.pipeline.num_pages)
    return _over_layers(work, 8 * STEADY_STEPS * parts, seconds)


def prefill_seconds(costs: Costs, policy: Policy, workload: Workload) -> float:
    """Simulated seconds of one batch's prefill; of very many chunks, each stands for several."""
    shape, _, pages_in_one = _simulated_shape(policy)
    affordable = MAX_TASKS // (MIN_LAYERS * _TASKS_A_CHUNK)
    work = prefill_work(costs, policy, workload, shape=shape, max_chunks=affordable)
    chunks = ceil(policy.batch_size * workload.prompt_len / policy.prefill_chunk_tokens)
    in_one = chunks / work.pipeline.num_micro_batches
    tasks_a_layer = _TASKS_A_CHUNK * work.pipeline.num_micro_batches
    return _over_layers(work, tasks_a_layer, lambda work: max(_walked(work, in_one, pages_in_one)[1]))


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


def _walked(work: TaskWork, in_one: float, pages_in_one: float) -> tuple[Order, list[float]]:
    """The order of a phase's tasks and when each ends; quicker than `simulate_work`.

    A micro-batch or chunk of the work stands for `in_one` of them, and so takes that much longer; a
    page of weights for `pages_in_one` smaller ones, if there are several.
    """
    pipeline = work.pipeline
    pages_in_one = pages_in_one if pipeline.num_pages > 1 else 1.0
    order = _order(pipeline, work.policy.schedule)
    pages = round(pipeline.num_pages * pages_in_one)
    seconds_of = replace(work, pipeline=replace(pipeline, num_pages=pages)).seconds_of()
    seconds = [seconds_of(task_id) * (pages_in_one if task_id.act in _PAGES else in_one) for task_id in order.distinct]
    return order, end_times(order, seconds)


@lru_cache(maxsize=32)  # contexts, and costs of what limits, differ in durations only
def _order(pipeline: Pipeline, schedule: ScheduleName) -> Order:
    def alike(task: TaskId) -> tuple[Act, int]:
        return task.act, task.layer

    return in_order(iter_tasks(pipeline, schedule), alike)


def _over_layers(work: TaskWork, tasks_a_layer: int, seconds: Callable[[TaskWork], float]) -> float:
    """`seconds` of the whole work, from two shortened forms of it if it is long."""
    layers = work.pipeline.num_layers
    many = max(MIN_LAYERS, MAX_TASKS // tasks_a_layer)
    if layers <= many:
        return seconds(work)
    few = many // 2
    seconds_few, seconds_many = seconds(_cut(work, few)), seconds(_cut(work, many))
    return seconds_many + (seconds_many - seconds_few) * (layers - many) / (many - few)


def _cut(work: TaskWork, layers: int) -> TaskWork:
    """The same work over fewer layers, each of which stands for equally many of the whole."""
    pipeline = work.pipeline
    span = pipeline.num_layers / layers

    def shares(of_each: Sequence[float]) -> tuple[float, ...]:
        """Means over the layers that each cut layer stands for, parts of a layer included."""
        ends = [0.0, *accumulate(of_each)]

        def total(position: float) -> float:
            whole = min(int(position), len(of_each) - 1)
            return ends[whole] + (position - whole) * of_each[whole]

        return tuple((total((i + 1) * span) - total(i * span)) / span for i in range(layers))

    def mix(first: float, last: float) -> LayerMix:
        """Shares of the kinds of layer between two positions."""
        kinds = dict.fromkeys(work.costs.spec.layers[int(first) : ceil(last - 1e-9)], 0.0)
        for layer in range(int(first), ceil(last - 1e-9)):
            part = min(layer + 1, last) - max(layer, first)
            kinds[work.costs.spec.layer_kind(layer)] += part / (last - first)
        return tuple(kinds.items())

    mixes = tuple(mix(i * span, (i + 1) * span) for i in range(layers))
    return replace(
        work,
        mean_residents=shares(work.resident_experts),
        layer_mixes=mixes if len(work.costs.spec.layer_kinds()) > 1 else (),
        pipeline=replace(
            pipeline,
            num_layers=layers,
            streamed=tuple(share > 1e-9 for share in shares(pipeline.streamed)),
            cpu_experts=tuple(share > 1e-9 for share in shares(pipeline.cpu_experts)),
        ),
    )
