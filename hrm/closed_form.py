"""The closed form: seconds of a layer, a phase and a job from the work of each lane.

`T = max(link, CPU, GPU)` a layer (MoE-Lightning, arXiv 2411.11217, §4.2) with every transfer and
projection counted. Fields of a point may be numbers or NumPy arrays: the search evaluates a whole
grid of policies with the same lines that estimate one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from hrm.acts import ACTS, Counts, Load, decode, prefill
from hrm.contract.rings import EXPERT_SLOTS
from hrm.costs import Costs
from hrm.formats import Format
from hrm.lane_work import LaneWork, PhaseSeconds
from hrm.model_spec import ModelSpec
from hrm.numeric import Number, is_zero, maximum, minimum, where
from hrm.placement import Place, Placement, caches_at
from hrm.policy import Policy, ScheduleName
from hrm.schedules import SCHEDULES, StepWork
from hrm.schedules.orders import lookahead
from hrm.tasks import Act, Device, Lane, Phase
from hrm.workload import Workload

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Places in a stretch of contexts, and the share of its steps that each stands for.
_SIMPSON: Final[Mapping[float, float]] = {0.0: 1 / 6, 0.5: 4 / 6, 1.0: 1 / 6}


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A policy, or a grid of them, in the numbers that the closed form needs.

    `resident_experts` is the mean over the layers with experts, and `host_expert_layers` the share
    of all layers that have experts which are not resident; `last_on_host` says whether the last
    layer is one of them, which has `last_residents`. Where means hide how experts are spread, the
    others have at most `fewer_residents` less than they seem to. Truths are 0 or 1. Prompts are prefilled
    in whole chunks of equal size, but with `parts_of_chunks` their number may be any fraction.
    """

    batch_size: Number
    num_micro_batches: Number
    lookahead: Number
    num_weight_pages: Number
    gpu_attention: Number
    gpu_ffn: Number
    gpu_prefill_ffn: Number
    gpu_kv_micro_batches: Number
    resident_experts: Number
    host_expert_layers: Number
    last_on_host: Number
    last_residents: Number
    resident_dense: Number
    chunk_tokens: Number
    staging: int = 0
    experts_per_part: int = 0
    fewer_residents: Number = 0
    parts_of_chunks: bool = False

    def chunks(self, workload: Workload) -> tuple[Number, Number]:
        """How many chunks a batch is prefilled in, and their tokens."""
        tokens = self.batch_size * workload.prompt_len
        if self.parts_of_chunks:
            chunk = minimum(self.chunk_tokens, tokens)
            return tokens / chunk, chunk
        count = workload.chunks(self.batch_size, self.chunk_tokens)
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
            lookahead=lookahead(policy.num_micro_batches),
            num_weight_pages=policy.num_weight_pages,
            gpu_attention=int(policy.attention is Device.GPU),
            gpu_ffn=int(policy.ffn is Device.GPU),
            gpu_prefill_ffn=int(policy.prefill_ffn is Device.GPU),
            gpu_kv_micro_batches=policy.gpu_kv_micro_batches,
            resident_experts=sum(policy.resident_experts) / max(spec.num_expert_layers, 1),
            host_expert_layers=some_on_host / layers,
            last_on_host=int(policy.resident_experts[-1] < spec.layers[-1].num_experts),
            last_residents=policy.resident_experts[-1],
            resident_dense=int(policy.resident_dense),
            chunk_tokens=policy.prefill_chunk_tokens,
            staging=int(policy.staging),
            experts_per_part=policy.experts_per_part,
        )

    def streamed_bytes(self, spec: ModelSpec, weights: Format, phase: Phase) -> Number:
        """Weight bytes of a layer that are loaded whole in the phase, as a mean over layers."""
        placement = Placement(
            spec=spec,
            weights=weights,
            resident_dense=self.resident_dense,
            cpu_experts=1 - (self.gpu_ffn if phase is Phase.DECODE else self.gpu_prefill_ffn),
            in_parts=int(self.experts_per_part > 0),
        )
        resident = spec.num_expert_layers * self.resident_experts
        return placement.bytes_in_all(Place.STREAMED, resident) / spec.num_layers

    def host_experts(self, spec: ModelSpec) -> Number:
        """Experts on the host, as a mean over the layers that have some."""
        in_all = (spec.num_expert_layers / spec.num_layers) * (spec.num_experts - self.resident_experts)
        return in_all / maximum(self.host_expert_layers, 1e-9)

    def gpu_experts(self, spec: ModelSpec, on_gpu: Number, resident: Number) -> Number:
        """Experts that are computed with the rest of a layer: all if they run `on_gpu` and do not come in parts."""
        return resident if self.experts_per_part else where(on_gpu, spec.num_experts, resident)

    def parts(self, spec: ModelSpec) -> Number:
        """In how many parts experts stream where they do, as a mean over all layers; the last may be a part of one."""
        if not self.experts_per_part:
            return 0
        return self.host_expert_layers * self.host_experts(spec) / self.experts_per_part

    def last_parts(self, spec: ModelSpec) -> Number:
        """The same of the last layer."""
        if not (self.experts_per_part and spec.layers[-1].has_experts):
            return 0
        return (spec.num_experts - self.last_residents) / self.experts_per_part

    def kv_share_at(self, place: Place) -> Number:
        """Which share of the micro-batches has its KV cache at a place."""
        number = self.num_micro_batches
        held = caches_at(place, number=number, on_gpu=self.gpu_kv_micro_batches, gpu_attention=self.gpu_attention)
        return held / number


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeStep:
    """The work of one decode step: of the acts that depend on the context, and of the others, worked out already."""

    costs: Costs
    schedule: ScheduleName
    lookahead: Number
    counts: Counts
    load: Load
    fixed: LaneWork

    @staticmethod
    def of_point(costs: Costs, point: Point, schedule: ScheduleName, active_share: float = 1.0) -> "DecodeStep":
        """The step of a point in which that share of the requests is still generating."""
        spec = costs.spec
        n = point.num_micro_batches
        pages = point.num_weight_pages if SCHEDULES[schedule].paged else 1
        counts = Counts(
            layers=spec.num_layers,
            pieces=n,
            pages=pages,
            cpu_attention=point.kv_share_at(Place.HOST),
            streams_kv=point.kv_share_at(Place.STREAMED),
            cpu_experts=(1 - point.gpu_ffn) * point.host_expert_layers,
            parts=point.gpu_ffn * point.parts(spec),
            staging=point.staging,
            ranks=spec.ranks,
        )
        load = Load(
            costs=costs,
            kind=spec.layers[0],
            tokens=active_share * point.batch_size / n,
            context=0,
            known={},
            gpu_experts=point.gpu_experts(spec, point.gpu_ffn, point.resident_experts),
            host_experts=point.host_experts(spec),
            part_experts=point.experts_per_part,
            page_bytes=point.streamed_bytes(spec, costs.formats.weights, Phase.DECODE) / pages,
        )
        fixed = LaneWork.of((act for act in ACTS[Phase.DECODE] if not act.attends), counts, load)
        return DecodeStep(
            costs=costs, schedule=schedule, lookahead=point.lookahead, counts=counts, load=load, fixed=fixed
        )

    def seconds(self, context: Number) -> PhaseSeconds:
        """Seconds of the step over a mean context."""
        attending = (act for act in ACTS[Phase.DECODE] if act.attends)
        work = self.fixed + LaneWork.of(attending, self.counts, self.load._replace(context=context))
        in_flight = minimum(self.counts.pieces, self.lookahead + (work.seconds.get(decode.CPU_EXPERTS, 0.0) > 0))
        return work.in_all(self.costs, in_flight)

    def terms(self, context: Number) -> tuple[Number, ...]:
        """What the step takes at least over a mean context, for several reasons; see `in_order`."""
        return self.in_order(self.seconds(context))

    def in_order(self, seconds: PhaseSeconds) -> tuple[Number, ...]:
        """What the step takes at least, for several reasons, those of the schedule last; the longest is its time."""
        lanes, acts = seconds.lanes, seconds.acts
        step = StepWork(
            gpu_s=lanes[Lane.GPU],
            cpu_s=lanes[Lane.CPU],
            h2d_s=lanes[Lane.H2D],
            d2h_s=lanes[Lane.D2H],
            weights_s=acts.get(decode.LOAD_PAGE, 0.0),
            attention_s=acts.get(decode.ATTENTION, 0.0),
            cpu_attention_s=acts.get(decode.CPU_ATTENTION, 0.0),
            exchange_s=acts.get(decode.OFFLOAD_QKV, 0.0) + acts.get(decode.LOAD_HIDDEN, 0.0),
            num_micro_batches=self.counts.pieces,
            lookahead=self.lookahead,
            cpu_attention=self.counts.cpu_attention,
            streams_kv=self.counts.streams_kv,
        )
        of_schedule = SCHEDULES[self.schedule].terms(step)
        if not is_zero(self.counts.parts):  # which no schedule's own terms know of
            of_schedule = tuple((self.counts.parts == 0) * term for term in of_schedule)
        return (*seconds.terms, *self._in_parts(seconds), *of_schedule, *seconds.shared_cores)

    def _in_parts(self, seconds: PhaseSeconds) -> tuple[Number, ...]:
        if not self.load.part_experts:
            return ()
        in_turn_s, _ = parts_in_turn(seconds, self.counts, self.load, (decode.LOAD_PART, decode.PART_EXPERTS))
        # While a lone micro-batch is away to the CPU's attention, the GPU has nothing else to do.
        away_s = maximum(seconds.chain_s - seconds.lanes[Lane.GPU], 0)
        return in_turn_s, (self.counts.pieces == 1) * (in_turn_s > 0) * (in_turn_s + away_s)


def parts_in_turn(
    seconds: PhaseSeconds, counts: Counts, load: Load, acts: tuple[Act, Act], behind_s: Number = 0
) -> tuple[Number, Number]:
    """What a phase takes at least where experts stream in parts, which are loaded and computed by these acts.

    In every layer of a micro-batch or chunk the GPU does all else, and computes the first part before the one may be
    loaded that takes its place; when the last is there, it still computes that. So all but as many parts as there are
    slots are loaded between these. The model's last layer may have less to compute. Nothing is said where layers have
    fewer parts. In all of them together the GPU waits `behind_s` for what is behind parts in the link's order.
    """
    spec, (loads, computes) = load.spec, acts
    with_parts = counts.pieces * spec.num_expert_layers
    in_all = counts.in_layers * counts.parts
    part_s = load.costs.load_weights(load.part_experts * load.costs.expert_bytes)
    gpu_s, experts_s = seconds.lanes[Lane.GPU], seconds.acts.get(computes, 0.0)
    overlapping_s = EXPERT_SLOTS * part_s - 2 * minimum(experts_s / maximum(in_all, 1e-9), part_s)
    ahead_s = with_parts * overlapping_s + EXPERT_SLOTS * counts.pieces * part_s * (load.last is not None)
    in_turn_s = gpu_s - experts_s + seconds.acts.get(loads, 0.0) - ahead_s + behind_s
    return (in_all >= EXPERT_SLOTS * with_parts) * in_turn_s, (in_all > 0) * (gpu_s + behind_s)


def prefill_terms(costs: Costs, point: Point, workload: Workload) -> tuple[Number, ...]:
    """What prefill takes at least, for several reasons; the longest is its time.

    The last is the chain of every chunk's tasks in a layer: its hidden states come, are computed on
    and go, in buffers for two chunks, and two more may be with the CPU's experts. A chunk that is the
    only one overlaps with nothing.
    """
    counts, load, seconds = _prefill(costs, point, workload)
    if not load.part_experts:
        return (*seconds.terms, *seconds.shared_cores)
    # The part that takes the place of a chunk's last is loaded ahead of the next chunk's hidden states, as long as
    # there are such parts, and the GPU has nothing but tokens to choose until these come.
    layers = counts.layers * point.host_expert_layers
    expert_s = costs.load_weights(costs.expert_bytes)
    hidden_s = seconds.acts.get(prefill.LOAD_HIDDEN, 0.0) / max(counts.layers - 1, 1)
    behind_s = (1 - EXPERT_SLOTS / counts.pieces) * hidden_s * (layers - 1)
    behind_s = behind_s + (counts.pieces * layers - EXPERT_SLOTS) * expert_s
    behind_s = behind_s - sum(seconds.acts.get(act, 0.0) for act in (prefill.SAMPLE, prefill.REDUCE_LAST))
    acts = prefill.LOAD_PART, prefill.PART_EXPERTS
    return (*seconds.terms, *parts_in_turn(seconds, counts, load, acts, behind_s), *seconds.shared_cores)


def whole_prefill(costs: Costs, point: Point, workload: Workload) -> PhaseSeconds:
    """The work of the prefill of one batch."""
    return _prefill(costs, point, workload)[2]


def _prefill(costs: Costs, point: Point, workload: Workload) -> tuple[Counts, Load, PhaseSeconds]:
    """How many tasks it has, what they have to do, and their seconds."""
    chunks, chunk = point.chunks(workload)
    spec, cpu_ffn = costs.spec, 1 - point.gpu_prefill_ffn
    any_on_cpu = not is_zero(cpu_ffn)
    told_apart = any_on_cpu or point.experts_per_part > 0
    counts = Counts(
        layers=spec.num_layers,
        pieces=chunks,
        pages=1,
        cpu_experts=cpu_ffn * point.host_expert_layers if any_on_cpu else 0,
        last_cpu_experts=cpu_ffn * point.last_on_host if any_on_cpu else 0,
        parts=point.gpu_prefill_ffn * point.parts(spec),
        last_parts=point.gpu_prefill_ffn * point.last_parts(spec),
        staging=point.staging,
        ranks=spec.ranks,
    )
    load = Load(
        costs=costs,
        kind=spec.layers[0],
        tokens=chunk,
        context=workload.prompt_len,
        known={},
        requests=point.batch_size / chunks,
        stored_share=1 - point.kv_share_at(Place.GPU),
        gpu_experts=point.gpu_experts(spec, point.gpu_prefill_ffn, point.resident_experts)
        if told_apart
        else spec.num_experts,
        host_experts=point.host_experts(spec) if told_apart else 0,
        part_experts=point.experts_per_part,
        page_bytes=point.streamed_bytes(spec, costs.formats.weights, Phase.PREFILL),
    )
    if costs.skips_in_last_layer(workload.prompt_len):
        load = _with_last(load, point) if told_apart else load._replace(last=load._replace(is_last=True))
    with_cpu = (counts.cpu_experts > 0) * ((chunks > 2) + 1 * (chunks > 3))
    work = LaneWork.of(ACTS[Phase.PREFILL], counts, load)
    return counts, load, work.in_all(costs, under_way=1 + (chunks > 1) + with_cpu)


def _with_last(load: Load, point: Point) -> Load:
    """The load of all layers but the last, with that of the last, which goes on with fewer tokens."""
    spec = load.spec
    has_experts = int(spec.layers[-1].has_experts)
    others = spec.num_expert_layers - has_experts
    resident = spec.num_expert_layers * point.resident_experts - point.last_residents
    some_on_host = spec.num_layers * point.host_expert_layers - point.last_on_host
    on_host = has_experts * spec.num_experts - point.last_residents
    each = maximum(resident / max(others, 1) - point.fewer_residents, 0)
    last = load._replace(
        is_last=True,
        gpu_experts=point.gpu_experts(spec, point.gpu_prefill_ffn, point.last_residents),
        host_experts=on_host / maximum(point.last_on_host, 1e-9),
    )
    return load._replace(
        last=last,
        gpu_experts=point.gpu_experts(spec, point.gpu_prefill_ffn, each),
        host_experts=(others * spec.num_experts - resident) / maximum(some_on_host, 1e-9),
    )


def batch_terms(
    costs: Costs, point: Point, schedule: ScheduleName, workload: Workload
) -> "list[tuple[NDArray[np.float64], tuple[Number, ...]]]":
    """What prefill and decode of one batch are made of: weights, each in a row of its own, with terms.

    A batch's time is the sum over the rows of both of a weight times the longest of its terms. Prefill has one row,
    decode one for each of `sampled_contexts`; terms that are alike in all rows may have one only. All contexts are
    worked out at once: a grid is seldom so large that its numbers take longer than the calls.
    """
    import numpy as np

    step = DecodeStep.of_point(costs, point, schedule, workload.active_share)
    contexts, steps = np.array(list(sampled_contexts(costs.spec, workload).items())).T[:, :, None]
    turns = np.array([[costs.prefills_in_turn]])
    return [(turns, prefill_terms(costs, point, workload)), (steps, step.terms(contexts))]


def stacked(terms: Iterable[Number], shape: tuple[int, int]) -> "NDArray[np.float64]":
    """Terms of `batch_terms` as one array, in each of so many rows and for so many policies."""
    import numpy as np

    return np.stack([np.broadcast_to(np.asarray(term, dtype=float), shape) for term in terms])


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


def batch_seconds(costs: Costs, point: Point, schedule: ScheduleName, workload: Workload) -> tuple[float, float]:
    """Prefill and decode seconds of one batch; in a pipeline, with its share of what that waits to be filled."""
    step = DecodeStep.of_point(costs, point, schedule, workload.active_share)
    prefill_s = costs.prefills_in_turn * float(maximum(*prefill_terms(costs, point, workload)))
    steps_at = sampled_contexts(costs.spec, workload)
    return prefill_s, sum(steps * float(maximum(*step.terms(context))) for context, steps in steps_at.items())


def seconds_of_batches(costs: Costs, point: Point, schedule: ScheduleName, workload: Workload) -> Number:
    """Seconds of one batch of every policy of a grid, as `batch_seconds` has them."""
    prefill_s, decode_s = phases_of_batches(costs, point, schedule, workload)
    return costs.prefills_in_turn * prefill_s + decode_s


def phases_of_batches(costs: Costs, point: Point, schedule: ScheduleName, workload: Workload) -> tuple[Number, Number]:
    """Prefill and decode seconds of one batch of every policy of a grid; without what a pipeline waits to be filled."""
    (_, of_prefill), (steps, of_decode) = batch_terms(costs, point, schedule, workload)
    return maximum(*of_prefill), (steps * maximum(*of_decode)).sum(axis=0)
