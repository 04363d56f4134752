"""The closed form: seconds of a layer, a phase and a job from the work of each lane.

`T = max(link, CPU, GPU)` a layer (MoE-Lightning, arXiv 2411.11217, §4.2) with every transfer and
projection counted. Fields of a point may be numbers or NumPy arrays: the search evaluates a whole
grid of policies with the same lines that estimate one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

from hrm import operators
from hrm.costs import Costs
from hrm.formats import Format
from hrm.model_spec import LayerKind, ModelSpec
from hrm.numeric import Number, maximum, minimum, share_of, where
from hrm.policy import Policy, ScheduleName
from hrm.schedules import SCHEDULES
from hrm.schedules.orders import LOOKAHEAD
from hrm.tasks import Device, Lane
from hrm.workload import Workload

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
            count < spec.num_experts_of(spec.layer_kind(layer)) for layer, count in enumerate(policy.resident_experts)
        )
        return Point(
            batch_size=policy.batch_size,
            num_micro_batches=policy.num_micro_batches,
            gpu_attention=int(policy.attention is Device.GPU),
            gpu_ffn=int(policy.ffn is Device.GPU),
            gpu_kv_micro_batches=policy.gpu_kv_micro_batches,
            resident_experts=sum(policy.resident_experts) / max(spec.num_expert_layers, 1),
            host_expert_layers=some_on_host / layers,
            resident_dense=int(policy.resident_dense),
            chunk_tokens=policy.prefill_chunk_tokens,
            staging=int(policy.staging),
        )

    def streamed_bytes(self, spec: ModelSpec, weights: Format) -> Number:
        """Weight bytes of a layer that are not on the GPU, as a mean over layers."""
        share = spec.num_expert_layers / spec.num_layers
        experts = share * (spec.num_experts - self.resident_experts) * spec.expert_parameters
        return weights.bytes_of(experts) + self._streamed_dense_bytes(spec, weights)

    def decode_streamed_bytes(self, spec: ModelSpec, weights: Format) -> Number:
        """Bytes of a layer loaded in every decode step."""
        dense = self._streamed_dense_bytes(spec, weights)
        return where(self.gpu_ffn, self.streamed_bytes(spec, weights), dense)

    def _streamed_dense_bytes(self, spec: ModelSpec, weights: Format) -> Number:
        kinds = spec.layer_kinds()
        mean = sum(count * spec.dense_parameters_of(kind) for kind, count in kinds.items())
        return (1 - self.resident_dense) * weights.bytes_of(mean / spec.num_layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeStep:
    """The work of one decode step, as far as it does not depend on the context.

    `m` is the mean number of active requests in a micro-batch. `cpu_attention` and `streams_kv` are
    shares of the micro-batches; seconds are those of one micro-batch in one layer, but for weights
    and pages, which are a layer's, and `embed_s` and `sample_s`, once a step. `moved_bytes` cross
    the link and `read_bytes` are the processor's, in a layer, its cache apart.
    """

    costs: Costs
    point: Point
    schedule: ScheduleName
    m: Number
    cpu_attention: Number
    streams_kv: Number
    projections_s: Number
    cpu_experts_s: Number
    to_gpu_s: Number
    to_host_s: Number
    weights_s: Number
    stage_s: Number
    embed_s: Number
    sample_s: Number
    moved_bytes: Number
    read_bytes: Number

    @staticmethod
    def of_point(costs: Costs, point: Point, schedule: ScheduleName, active_share: float = 1.0) -> "DecodeStep":
        """The step of a point in which that share of the requests is still generating."""
        spec, formats = costs.spec, costs.formats
        n = point.num_micro_batches
        m = active_share * point.batch_size / n
        off_gpu = 1 - point.gpu_kv_micro_batches / n
        cpu_attention = off_gpu * (1 - point.gpu_attention)
        streams_kv = off_gpu * point.gpu_attention
        cpu_ffn = (1 - point.gpu_ffn) * point.host_expert_layers
        gpu_experts = where(point.gpu_ffn, spec.num_experts, point.resident_experts)
        on_host = (spec.num_expert_layers / spec.num_layers) * (spec.num_experts - point.resident_experts)
        cpu_experts = on_host / maximum(point.host_expert_layers, 1e-9)
        weights = point.decode_streamed_bytes(spec, formats.weights)
        pages = n if SCHEDULES[schedule].paged else 1
        qkv = operators.qkv_bytes(spec, formats, m)
        attended = operators.attention_output_bytes(spec, formats, m)
        routed = operators.routed_token_bytes(spec, formats, m)
        hidden = operators.hidden_bytes(spec, formats, m)
        new_kv = operators.kv_bytes(spec, formats, m)

        def cpu_expert_bytes() -> Number:
            hit = spec.experts_hit(m) / spec.num_experts * on_host * spec.expert_parameters
            return n * formats.weights.bytes_of(hit)

        return DecodeStep(
            costs=costs,
            point=point,
            schedule=schedule,
            m=m,
            cpu_attention=cpu_attention,
            streams_kv=streams_kv,
            projections_s=costs.pre_attention(m)
            + costs.mean_over_layers(lambda kind: costs.post_attention(m, gpu_experts, kind), by_window=False),
            cpu_experts_s=share_of(cpu_ffn, lambda: costs.cpu_experts(m, cpu_experts)),
            to_gpu_s=share_of(cpu_attention, lambda: costs.h2d(attended))
            + share_of(cpu_ffn, lambda: costs.h2d_to_all(hidden)),
            to_host_s=share_of(cpu_attention, lambda: costs.d2h(qkv))
            + share_of(cpu_ffn, lambda: costs.d2h(routed))
            + share_of(streams_kv, lambda: costs.d2h(new_kv)),
            weights_s=costs.load_weights(weights, pages),
            stage_s=share_of(point.staging, lambda: costs.stage(weights, pages)),
            embed_s=costs.h2d_to_all(hidden),
            sample_s=costs.sample(m),
            moved_bytes=weights
            + n * (cpu_attention * (qkv + attended) + cpu_ffn * (routed + hidden))
            + n * (streams_kv * new_kv + hidden / spec.num_layers),
            read_bytes=2 * point.staging * weights + share_of(1 - point.gpu_ffn, cpu_expert_bytes),
        )

    @property
    def all_reduce_s(self) -> Number:
        """Seconds of the step in which several GPUs exchange sums; part of the GPU's lane."""
        tasks = self.costs.spec.num_layers * self.point.num_micro_batches
        return tasks * 2 * self.costs.all_reduce(self.m)

    def _attention(self, context: Number) -> tuple[Number, Number, Number, Number]:
        """Seconds on the GPU, on the CPU and to load the cache; and the cache's bytes."""
        costs, spec = self.costs, self.costs.spec

        def cache_bytes(kind: LayerKind) -> Number:
            return operators.kv_bytes(spec, costs.formats, self.m * spec.context_in(kind, context))

        def attention(device: Device) -> Number:
            return costs.mean_over_layers(lambda kind: costs.attention(device, self.m, context, kind))

        def load_kv() -> Number:
            return costs.mean_over_layers(lambda kind: costs.load_kv(cache_bytes(kind)))

        return (
            share_of(1 - self.cpu_attention, lambda: attention(Device.GPU)),
            share_of(self.cpu_attention, lambda: attention(Device.CPU)),
            share_of(self.streams_kv, load_kv),
            share_of(self.cpu_attention + self.streams_kv, lambda: costs.mean_over_layers(cache_bytes)),
        )

    def lanes(self, context: Number) -> tuple[dict[Lane, Number], Number]:
        """Seconds of work in each lane over a mean context, and those that host memory needs."""
        lanes, host_memory_s, _ = self.seconds(context)
        return lanes, host_memory_s

    def seconds(self, context: Number) -> "StepSeconds":
        """Seconds of the step over a mean context, by what takes them."""
        layers, n = self.costs.spec.num_layers, self.point.num_micro_batches
        gpu_attention_s, cpu_attention_s, load_kv_s, cache_bytes = self._attention(context)
        gpu_s = self.projections_s + gpu_attention_s
        cpu_s = self.cpu_experts_s + cpu_attention_s
        lanes = {
            Lane.GPU: n * (layers * gpu_s + self.sample_s),
            Lane.CPU: layers * n * cpu_s,
            Lane.H2D: layers * (self.weights_s + n * (self.to_gpu_s + load_kv_s)) + n * self.embed_s,
            Lane.D2H: layers * n * self.to_host_s,
            Lane.STAGE: layers * self.stage_s,
        }
        passes = self.costs.runtime.attention_passes
        streamed = n * self.streams_kv / maximum(self.streams_kv + self.cpu_attention, 1e-9)
        attended = n * passes - streamed * passes
        host_memory_s = layers * self.costs.host_memory(
            moved_bytes=self.moved_bytes + streamed * cache_bytes, read_bytes=self.read_bytes + attended * cache_bytes
        )
        in_flight = minimum(n, LOOKAHEAD + (self.cpu_experts_s > 0))
        chain_s = layers * n / in_flight * (gpu_s + cpu_s + self.to_gpu_s + self.to_host_s)
        return StepSeconds(lanes, host_memory_s, chain_s)

    def terms(self, context: Number) -> tuple[Number, ...]:
        """What the step takes at least over a mean context, for several reasons; see `in_order`."""
        return self.in_order(self.seconds(context))

    def in_order(self, seconds: "StepSeconds") -> tuple[Number, ...]:
        """What the step takes at least, for several reasons; the longest is its time.

        CGOPipe overlaps all lanes, as far as micro-batches in flight allow. The other orders move
        a layer's weights whole, ahead of transfers that the current layer waits for. With
        FastDecode these are the hidden states of its micro-batches from the second on. With FlexGen
        they are the first cache, and its attention on the CPU runs in turn with the GPU; this is of
        layers alike, and longer than it takes if some have no weights to load. DeepSpeed loads
        the next layer only once the last one's buffer is free.
        """
        lanes = seconds.lanes
        terms = (*lanes.values(), seconds.host_memory_s, seconds.chain_s)
        weights = self.costs.spec.num_layers * self.weights_s
        n = self.point.num_micro_batches
        match self.schedule:
            case ScheduleName.CGOPIPE:
                return terms
            case ScheduleName.FASTDECODE:
                behind = maximum(n * self.cpu_attention - LOOKAHEAD, 0) / n
                return (*terms, weights + behind * lanes[Lane.GPU])
            case ScheduleName.FLEXGEN | ScheduleName.FLEXGEN_C:
                on_cpu = self.cpu_attention > 0
                behind = on_cpu + (self.streams_kv > 0)
                small = lanes[Lane.H2D] - weights
                in_turn = lanes[Lane.GPU] + lanes[Lane.CPU] + lanes[Lane.D2H] + small
                # The first micro-batch's attention, and that of caches on the GPU, runs meanwhile.
                serial = weights + in_turn * maximum(n * self.cpu_attention - 1, 0) / n
                return (
                    *terms,
                    behind * where(on_cpu, serial, weights + small),
                    behind * where(on_cpu, in_turn, weights + lanes[Lane.GPU]),
                    behind * where(on_cpu, in_turn, weights + lanes[Lane.CPU]),
                )
            case ScheduleName.DEEPSPEED:
                busy = lanes[Lane.GPU] + lanes[Lane.CPU] + lanes[Lane.D2H]
                return (*terms, weights, busy + lanes[Lane.H2D] - weights)


class StepSeconds(NamedTuple):
    """Seconds of a decode step: of each lane, of the host's memory, and as a chain.

    A micro-batch's layer is a chain of tasks, and no more than LOOKAHEAD are under way, or one more
    if the CPU has experts.
    """

    lanes: dict[Lane, Number]
    host_memory_s: Number
    chain_s: Number


def prefill_lanes(costs: Costs, point: Point, workload: Workload) -> tuple[dict[Lane, Number], Number]:
    """Seconds of work in each lane in the prefill of one batch, and those of the host's memory."""
    lanes, host_memory_s, _ = _prefill(costs, point, workload)
    return lanes, host_memory_s


def prefill_terms(costs: Costs, point: Point, workload: Workload) -> tuple[Number, ...]:
    """What prefill takes at least, for several reasons; the longest is its time.

    The last is the chain of every chunk's tasks in a layer: its hidden states come, are computed on
    and go, in buffers for two chunks. A chunk that is the only one overlaps with nothing.
    """
    lanes, host_memory_s, chain_s = _prefill(costs, point, workload)
    return (*lanes.values(), host_memory_s, chain_s)


def _prefill(costs: Costs, point: Point, workload: Workload) -> tuple[dict[Lane, Number], Number, Number]:
    spec, formats, layers = costs.spec, costs.formats, costs.spec.num_layers
    chunks, chunk = point.chunks(workload)
    weights = point.streamed_bytes(spec, formats.weights)
    hidden = operators.hidden_bytes(spec, formats, chunk)
    off_gpu = 1 - point.gpu_kv_micro_batches / point.num_micro_batches
    kv = off_gpu * operators.kv_bytes(spec, formats, chunk)
    stored = chunks * (layers * kv + (layers - 1) * hidden)
    gpu_s = chunks * (costs.prefill_layers(chunk, workload.prompt_len) + costs.first_tokens(point.batch_size / chunks))
    to_gpu_s = layers * chunks * costs.h2d_to_all(hidden)
    to_host_s = (layers - 1) * chunks * costs.d2h(hidden)
    lanes = {
        Lane.GPU: gpu_s,
        Lane.H2D: layers * costs.load_weights(weights) + to_gpu_s,
        Lane.D2H: chunks * layers * costs.d2h(kv) + to_host_s,
        Lane.STAGE: layers * share_of(point.staging, lambda: costs.stage(weights)),
    }
    host_memory_s = costs.host_memory(
        moved_bytes=layers * (weights + chunks * hidden) + stored, read_bytes=2 * point.staging * layers * weights
    )
    under_way = 1 + (chunks > 1)
    return lanes, host_memory_s, (gpu_s + to_gpu_s + to_host_s) / under_way


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
