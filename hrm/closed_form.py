"""The closed form: seconds of a layer, a phase and a job from the work of each lane.

`T = max(link, CPU, GPU)` a layer (MoE-Lightning, arXiv 2411.11217, §4.2) with every transfer and
projection counted. Fields of a point may be numbers or NumPy arrays: the search evaluates a whole
grid of policies with the same lines that estimate one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final, NamedTuple

from hrm.acts import Counts, Load, decode, prefill
from hrm.costs import Costs
from hrm.formats import Format
from hrm.model_spec import ModelSpec
from hrm.numeric import Number, is_zero, maximum, minimum, where
from hrm.placement import Place, Placement, caches_at
from hrm.policy import Policy, ScheduleName
from hrm.schedules import SCHEDULES, StepWork
from hrm.schedules.orders import LOOKAHEAD
from hrm.tasks import Act, Device, Lane, Phase
from hrm.workload import Workload

_LINKS: Final = frozenset({Lane.H2D, Lane.D2H})
# Places in a stretch of contexts, and the share of its steps that each stands for.
_SIMPSON: Final[Mapping[float, float]] = {0.0: 1 / 6, 0.5: 4 / 6, 1.0: 1 / 6}


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A policy, or a grid of them, in the numbers that the closed form needs.

    `resident_experts` is the mean over the layers with experts, and `host_expert_layers` the share
    of all layers that have experts which are not resident. Truths are 0 or 1. Prompts are prefilled
    in whole chunks of equal size, but with `parts_of_chunks` their number may be any fraction.
    """

    batch_size: Number
    num_micro_batches: Number
    num_weight_pages: Number
    gpu_attention: Number
    gpu_ffn: Number
    gpu_kv_micro_batches: Number
    resident_experts: Number
    host_expert_layers: Number
    resident_dense: Number
    chunk_tokens: Number
    staging: int = 0
    parts_of_chunks: bool = False

    def chunks(self, workload: Workload) -> tuple[Number, Number]:
        """How many chunks a batch is prefilled in, and their tokens."""
        tokens = self.batch_size * workload.prompt_len
        chunk = minimum(self.chunk_tokens, tokens)
        if self.parts_of_chunks:
            return tokens / chunk, chunk
        count = -(-tokens // chunk)
        return count, tokens / count

    @staticmethod
    def of_policy(policy: Policy, spec: ModelSpec) -> "Point":
        """The numbers of one policy."""
        layers = len(policy.resident_experts)
        some_on_host = sum(
            count < spec.layers[layer].num_experts for layer, count in enumerate(policy.resident_experts)
        )
        return Point(
            batch_size=policy.batch_size,
            num_micro_batches=policy.num_micro_batches,
            num_weight_pages=policy.num_weight_pages,
            gpu_attention=int(policy.attention is Device.GPU),
            gpu_ffn=int(policy.ffn is Device.GPU),
            gpu_kv_micro_batches=policy.gpu_kv_micro_batches,
            resident_experts=sum(policy.resident_experts) / max(spec.num_expert_layers, 1),
            host_expert_layers=some_on_host / layers,
            resident_dense=int(policy.resident_dense),
            chunk_tokens=policy.prefill_chunk_tokens,
            staging=int(policy.staging),
        )

    def streamed_bytes(self, spec: ModelSpec, weights: Format, phase: Phase) -> Number:
        """Weight bytes of a layer that are loaded in the phase, as a mean over layers."""
        placement = Placement(
            spec=spec,
            weights=weights,
            resident_dense=self.resident_dense,
            cpu_experts=1 - self.gpu_ffn if phase is Phase.DECODE else 0,
        )
        resident = spec.num_expert_layers * self.resident_experts
        return placement.bytes_in_all(Place.STREAMED, resident) / spec.num_layers

    def kv_share_at(self, place: Place) -> Number:
        """Which share of the micro-batches has its KV cache at a place."""
        number = self.num_micro_batches
        held = caches_at(place, number=number, on_gpu=self.gpu_kv_micro_batches, gpu_attention=self.gpu_attention)
        return held / number


class PhaseSeconds(NamedTuple):
    """Seconds of a decode step or of prefill: of the tasks of each act, of each lane, of the host's memory, as a chain.

    A micro-batch or chunk goes through a chain of tasks in every layer, and only so many are under way at once.
    """

    acts: dict[Act, Number]
    lanes: dict[Lane, Number]
    host_memory_s: Number
    chain_s: Number

    @property
    def terms(self) -> tuple[Number, ...]:
        """What all of it takes at least, whatever the order: each lane, the host's memory, and the chain."""
        return (*self.lanes.values(), self.host_memory_s, self.chain_s)

    @property
    def stretch(self) -> float:
        """How much longer work on the host's memory takes because all of it wants more than there is.

        Only as far as the memory is what limits the phase: until then, work can give way in turn.
        """
        if self.host_memory_s <= max(self.lanes.values()):
            return 1.0
        using = max(seconds for lane, seconds in self.lanes.items() if lane is not Lane.GPU)
        return self.host_memory_s / using if using else 1.0


@dataclass(frozen=True, slots=True)
class _Work:
    """What all tasks of some acts take and move: seconds by act, bytes over the links, and the CPU's own accesses."""

    seconds: dict[Act, Number]
    moved_bytes: Number = 0
    host_bytes: Number = 0

    @staticmethod
    def of(acts: Iterable[Act], counts: Counts, load: Load) -> "_Work":
        """Every act's tasks, each as a mean over the layers."""
        seconds: dict[Act, Number] = {}
        moved_bytes = host_bytes = 0
        loads_of: dict[tuple[bool, bool], list[tuple[float, Load]]] = {}
        for act in acts:
            count = act.count(counts)
            if is_zero(count):
                continue
            told_apart = act.attends, act.by_ffn
            if told_apart not in loads_of:
                loads_of[told_apart] = _loads(load, act)
            loads = loads_of[told_apart]
            if len(loads) == 1:
                of_all, num_bytes, on_host = _task(act, loads[0][1])
            else:
                tasks = [(share, _task(act, each)) for share, each in loads]
                of_all, num_bytes, on_host = (sum(share * task[i] for share, task in tasks) for i in range(3))
            seconds[act] = count * of_all
            if act.lane in _LINKS:
                moved_bytes = moved_bytes + count * num_bytes
            if act.lane is not Lane.GPU and not is_zero(on_host):
                host_bytes = host_bytes + count * on_host
        return _Work(seconds, moved_bytes, host_bytes)

    def __add__(self, other: "_Work") -> "_Work":
        """Of both, which have no act in common."""
        return _Work(
            {**self.seconds, **other.seconds}, self.moved_bytes + other.moved_bytes, self.host_bytes + other.host_bytes
        )

    def in_all(self, costs: Costs, under_way: Number) -> PhaseSeconds:
        """The seconds, with so many micro-batches or chunks under way at once."""
        host_memory_s = costs.host_memory(moved_bytes=self.moved_bytes, read_bytes=self.host_bytes)
        lanes: dict[Lane, Number] = dict.fromkeys(Lane, 0.0)
        for act, seconds in self.seconds.items():
            lanes[act.lane] = lanes[act.lane] + seconds
        chain_s = sum(seconds for act, seconds in self.seconds.items() if act.chained) / under_way
        return PhaseSeconds(self.seconds, lanes, host_memory_s, chain_s)


def _task(act: Act, load: Load) -> tuple[Number, Number, Number]:
    """Seconds of one task, bytes that it moves, and the CPU's accesses to the host's memory."""
    num_bytes = act.moves(load)
    return act.seconds(load, num_bytes), num_bytes, act.host_bytes(load)


def _loads(load: Load, act: Act) -> list[tuple[float, Load]]:
    """The loads of the layers that the act tells apart, each with its share of the layers."""
    spec = load.spec
    kinds = spec.alike(by_window=act.attends, by_ffn=act.by_ffn)
    shares = {(kind, False): count / spec.num_layers for kind, count in kinds.items()}
    if load.has_last and act.by_ffn:
        last = spec.layer_kind(spec.num_layers - 1)
        shares[last, False] -= 1 / spec.num_layers
        shares[last, True] = 1 / spec.num_layers
    if len(shares) == 1:
        return [(1.0, replace(load, kind=next(iter(shares))[0]))]
    return [
        (share, replace(load, kind=kind, is_last=is_last)) for (kind, is_last), share in shares.items() if share > 1e-12
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeStep:
    """The work of one decode step: of the acts that depend on the context, and of the others, worked out already."""

    costs: Costs
    schedule: ScheduleName
    counts: Counts
    load: Load
    fixed: _Work

    @staticmethod
    def of_point(costs: Costs, point: Point, schedule: ScheduleName, active_share: float = 1.0) -> "DecodeStep":
        """The step of a point in which that share of the requests is still generating."""
        spec = costs.spec
        n = point.num_micro_batches
        on_host = (spec.num_expert_layers / spec.num_layers) * (spec.num_experts - point.resident_experts)
        pages = point.num_weight_pages if SCHEDULES[schedule].paged else 1
        counts = Counts(
            layers=spec.num_layers,
            pieces=n,
            pages=pages,
            cpu_attention=point.kv_share_at(Place.HOST),
            streams_kv=point.kv_share_at(Place.STREAMED),
            cpu_experts=(1 - point.gpu_ffn) * point.host_expert_layers,
            staging=point.staging,
        )
        load = Load(
            costs=costs,
            kind=spec.layers[0],
            tokens=active_share * point.batch_size / n,
            context=0,
            gpu_experts=where(point.gpu_ffn, spec.num_experts, point.resident_experts),
            cpu_experts=on_host / maximum(point.host_expert_layers, 1e-9),
            page_bytes=point.streamed_bytes(spec, costs.formats.weights, Phase.DECODE) / pages,
        )
        fixed = _Work.of((act for act in decode.ALL if not act.attends), counts, load)
        return DecodeStep(costs=costs, schedule=schedule, counts=counts, load=load, fixed=fixed)

    @property
    def all_reduce_s(self) -> Number:
        """Seconds of the step in which several GPUs exchange sums; part of the GPU's lane."""
        return self.counts.layers * self.counts.pieces * 2 * self.costs.all_reduce(self.load.tokens)

    def seconds(self, context: Number) -> PhaseSeconds:
        """Seconds of the step over a mean context."""
        attending = (act for act in decode.ALL if act.attends)
        work = self.fixed + _Work.of(attending, self.counts, replace(self.load, context=context))
        in_flight = minimum(self.counts.pieces, LOOKAHEAD + (work.seconds.get(decode.CPU_EXPERTS, 0.0) > 0))
        return work.in_all(self.costs, in_flight)

    def terms(self, context: Number) -> tuple[Number, ...]:
        """What the step takes at least over a mean context, for several reasons; see `in_order`."""
        return self.in_order(self.seconds(context))

    def in_order(self, seconds: PhaseSeconds) -> tuple[Number, ...]:
        """What the step takes at least, for several reasons, those of the schedule last; the longest is its time."""
        step = StepWork.of(
            seconds.lanes,
            weights_s=seconds.acts.get(decode.LOAD_PAGE, 0.0),
            n=self.counts.pieces,
            cpu=self.counts.cpu_attention,
            streams=self.counts.streams_kv,
        )
        return (*seconds.terms, *SCHEDULES[self.schedule].terms(step))


def prefill_terms(costs: Costs, point: Point, workload: Workload) -> tuple[Number, ...]:
    """What prefill takes at least, for several reasons; the longest is its time.

    The last is the chain of every chunk's tasks in a layer: its hidden states come, are computed on
    and go, in buffers for two chunks. A chunk that is the only one overlaps with nothing.
    """
    return whole_prefill(costs, point, workload).terms


def whole_prefill(costs: Costs, point: Point, workload: Workload) -> PhaseSeconds:
    """The work of the prefill of one batch."""
    chunks, chunk = point.chunks(workload)
    counts = Counts(layers=costs.spec.num_layers, pieces=chunks, pages=1, staging=point.staging)
    load = Load(
        costs=costs,
        kind=costs.spec.layers[0],
        tokens=chunk,
        context=workload.prompt_len,
        has_last=costs.skips_in_last_layer(workload.prompt_len),
        requests=point.batch_size / chunks,
        stored_share=1 - point.kv_share_at(Place.GPU),
        gpu_experts=costs.spec.num_experts,
        page_bytes=point.streamed_bytes(costs.spec, costs.formats.weights, Phase.PREFILL),
    )
    return _Work.of(prefill.ALL, counts, load).in_all(costs, under_way=1 + (chunks > 1))


def prefill_all_reduce_s(costs: Costs, point: Point, workload: Workload) -> Number:
    """Seconds of prefill in which several GPUs exchange sums; part of the GPU's lane."""
    chunks, chunk = point.chunks(workload)
    whole_layers = costs.spec.num_layers - costs.skips_in_last_layer(workload.prompt_len)
    seconds = whole_layers * costs.all_reduce(chunk)
    if whole_layers < costs.spec.num_layers:
        ending = chunk / workload.prompt_len
        seconds += minimum(ending, 1) * costs.all_reduce(maximum(ending, 1))
    return chunks * 2 * seconds


def batch_terms(
    costs: Costs, point: Point, schedule: ScheduleName, workload: Workload
) -> list[tuple[float, tuple[Number, ...]]]:
    """What prefill and decode of one batch are made of: weights, each with terms.

    A batch's time is the sum of every weight times the longest of its terms. The first is prefill;
    the others are decode steps (`sampled_contexts`).
    """
    step = DecodeStep.of_point(costs, point, schedule, workload.active_share)
    return [
        (1.0, prefill_terms(costs, point, workload)),
        *((weight, step.terms(context)) for context, weight in sampled_contexts(costs.spec, workload).items()),
    ]


def sampled_contexts(spec: ModelSpec, workload: Workload) -> dict[float, float]:
    """Mean contexts that stand for all decode steps, each with its number of steps.

    Within a stretch of contexts each lane's work is a line in the context, so that a step's time,
    the longest of them, is convex: Simpson's rule is within a fraction of a per cent of the sum
    over all steps. A stretch ends where a context outgrows an attention window, as the line bends
    down there.
    """
    first = workload.prompt_len + 1
    last = workload.prompt_len + max(workload.decode_steps, 1)
    bends = {kind.window for kind in spec.layer_kinds()}
    ends = [first, *sorted(bend for bend in bends if first < bend < last), last]
    steps_at: dict[float, float] = {}
    for low, high in pairwise(ends):
        part = (high - low) / (last - first) if last > first else 1.0
        for place, share in _SIMPSON.items():
            context = low * (1 - place) + high * place
            steps_at[context] = steps_at.get(context, 0.0) + workload.decode_steps * part * share
    return steps_at


def batch_seconds(costs: Costs, point: Point, schedule: ScheduleName, workload: Workload) -> tuple[Number, Number]:
    """Prefill and decode seconds of one batch."""
    (_, prefill), *steps = batch_terms(costs, point, schedule, workload)
    return maximum(*prefill), sum(weight * maximum(*terms) for weight, terms in steps)


def seconds_of_batches(costs: Costs, point: Point, schedule: ScheduleName, workload: Workload) -> Number:
    """Seconds of one batch of every policy of a grid, as `batch_seconds` has them."""
    prefill_s, decode_s = phases_of_batches(costs, point, schedule, workload)
    return prefill_s + decode_s


def phases_of_batches(costs: Costs, point: Point, schedule: ScheduleName, workload: Workload) -> tuple[Number, Number]:
    """Prefill and decode seconds of one batch of every policy of a grid.

    All contexts are worked out at once: a grid is seldom so large that its numbers take longer
    than the calls.
    """
    import numpy as np

    prefill_s = maximum(*prefill_terms(costs, point, workload))
    step = DecodeStep.of_point(costs, point, schedule, workload.active_share)
    steps_at = sampled_contexts(costs.spec, workload)
    contexts, steps = np.array(list(steps_at.items())).T[:, :, None]
    decode_s = (steps * maximum(*step.terms(contexts))).sum(axis=0)
    return prefill_s, decode_s
