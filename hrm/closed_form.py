"""The closed form: seconds of a layer, a phase and a job from the work of each lane.

`T = max(link, CPU, GPU)` a layer (MoE-Lightning, arXiv 2411.11217, §4.2) with every transfer and
projection counted. Fields of a point may be numbers or NumPy arrays: the search evaluates a whole
grid of policies with the same lines that estimate one.
"""

from dataclasses import dataclass

from hrm import operators
from hrm.costs import Costs
from hrm.model_spec import ModelSpec
from hrm.numeric import Number, maximum, where
from hrm.policy import Policy, ScheduleName
from hrm.schedules import SCHEDULES
from hrm.schedules.orders import LOOKAHEAD
from hrm.tasks import Device, Lane
from hrm.units import DTYPE_BYTES
from hrm.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A policy, or a grid of them, in the numbers that the closed form needs.

    `resident_experts` is the mean over layers, and `host_expert_layers` the share of the layers
    with experts that are not resident. Truths are 0 or 1.
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

    @staticmethod
    def of_policy(policy: Policy, spec: ModelSpec) -> "Point":
        """The numbers of one policy."""
        layers = len(policy.resident_experts)
        some_on_host = sum(count < spec.num_experts for count in policy.resident_experts)
        return Point(
            batch_size=policy.batch_size,
            num_micro_batches=policy.num_micro_batches,
            gpu_attention=int(policy.attention is Device.GPU),
            gpu_ffn=int(policy.ffn is Device.GPU),
            gpu_kv_micro_batches=policy.gpu_kv_micro_batches,
            resident_experts=sum(policy.resident_experts) / layers,
            host_expert_layers=some_on_host / layers,
            resident_dense=int(policy.resident_dense),
            chunk_tokens=policy.prefill_chunk_tokens,
            staging=int(policy.staging),
        )

    def streamed_bytes(self, spec: ModelSpec, dtype: str) -> Number:
        """Weight bytes of a layer that are not on the GPU, as a mean over layers."""
        experts = (spec.num_experts - self.resident_experts) * spec.expert_parameters
        dense = (1 - self.resident_dense) * spec.dense_parameters
        return (experts + dense) * DTYPE_BYTES[dtype]

    def decode_streamed_bytes(self, spec: ModelSpec, dtype: str) -> Number:
        """Bytes of a layer loaded in every decode step."""
        dense = (1 - self.resident_dense) * spec.dense_parameters * DTYPE_BYTES[dtype]
        return where(self.gpu_ffn, self.streamed_bytes(spec, dtype), dense)


@dataclass(frozen=True, slots=True, kw_only=True)
class _MicroBatch:
    """Seconds of the tasks of one micro-batch in one layer of a decode step.

    `cpu_attention` and `streams_kv` are shares of the micro-batches, `cpu_ffn` of the layers.
    """

    cpu_attention: Number
    streams_kv: Number
    cpu_ffn: Number
    projections_s: Number
    gpu_attention_s: Number
    cpu_attention_s: Number
    cpu_experts_s: Number
    offload_qkv_s: Number
    load_hidden_s: Number
    offload_tokens_s: Number
    load_experts_s: Number

    @staticmethod
    def of_point(costs: Costs, point: Point, context: Number) -> "_MicroBatch":
        """The mean micro-batch of a point."""
        spec, dtype = costs.spec, costs.dtype
        m = point.batch_size / point.num_micro_batches
        off_gpu = 1 - point.gpu_kv_micro_batches / point.num_micro_batches
        gpu_experts = where(point.gpu_ffn, spec.num_experts, point.resident_experts)
        on_cpu = spec.num_experts - point.resident_experts
        return _MicroBatch(
            cpu_attention=off_gpu * (1 - point.gpu_attention),
            streams_kv=off_gpu * point.gpu_attention,
            cpu_ffn=(1 - point.gpu_ffn) * point.host_expert_layers,
            projections_s=costs.pre_attention(m) + costs.post_attention(m, gpu_experts),
            gpu_attention_s=costs.attention(Device.GPU, m, context),
            cpu_attention_s=costs.attention(Device.CPU, m, context),
            cpu_experts_s=costs.cpu_experts(m, on_cpu / maximum(point.host_expert_layers, 1e-9)),
            offload_qkv_s=costs.d2h(operators.qkv_bytes(spec, dtype, m)),
            load_hidden_s=costs.h2d(operators.attention_output_bytes(spec, dtype, m)),
            offload_tokens_s=costs.d2h(operators.routed_token_bytes(spec, dtype, m)),
            load_experts_s=costs.h2d(operators.hidden_bytes(spec, dtype, m)),
        )

    @property
    def gpu_s(self) -> Number:
        """Work of the GPU."""
        return self.projections_s + (1 - self.cpu_attention) * self.gpu_attention_s

    @property
    def cpu_s(self) -> Number:
        """Work of the CPU."""
        return self.cpu_attention * self.cpu_attention_s + self.cpu_ffn * self.cpu_experts_s

    @property
    def to_gpu_s(self) -> Number:
        """Hidden states on their way to the GPU."""
        return self.cpu_attention * self.load_hidden_s + self.cpu_ffn * self.load_experts_s

    @property
    def to_host_s(self) -> Number:
        """Queries, keys, values and tokens on their way to the host."""
        return self.cpu_attention * self.offload_qkv_s + self.cpu_ffn * self.offload_tokens_s


def decode_lanes(costs: Costs, point: Point, schedule: ScheduleName, context: Number
                 ) -> dict[Lane, Number]:  # fmt: skip
    """Seconds of work in each lane in one decode step over a mean context."""
    spec, dtype = costs.spec, costs.dtype
    n, layers = point.num_micro_batches, spec.num_layers
    m = point.batch_size / n
    one = _MicroBatch.of_point(costs, point, context)
    weights = point.decode_streamed_bytes(spec, dtype)
    pages = n if SCHEDULES[schedule].paged else 1
    load_kv = one.streams_kv * costs.h2d(operators.kv_bytes(spec, dtype, m * context))
    store_kv = one.streams_kv * costs.d2h(operators.kv_bytes(spec, dtype, m))
    embed = costs.h2d(operators.hidden_bytes(spec, dtype, m))
    return {
        Lane.GPU: layers * n * one.gpu_s + n * costs.sample(m),
        Lane.CPU: layers * n * one.cpu_s,
        Lane.H2D: layers * (costs.h2d(weights, pages) + n * (one.to_gpu_s + load_kv)) + n * embed,
        Lane.D2H: layers * n * (one.to_host_s + store_kv),
        Lane.STAGE: layers * point.staging * costs.stage(weights, pages),
    }


def step_terms(
    costs: Costs, point: Point, schedule: ScheduleName, context: Number
) -> tuple[Number, ...]:
    """What one decode step takes at least, for several reasons; the longest is its time.

    CGOPipe overlaps all lanes, as far as micro-batches in flight allow. FastDecode's GPU waits
    for the layer's weights besides; FlexGen and DeepSpeed load the next layer only once the last
    one's buffer is free, and FlexGen's attention on the CPU runs in turn with the GPU.
    """
    lanes = decode_lanes(costs, point, schedule, context)
    terms = (*lanes.values(), _chain_seconds(costs, point, context))
    weights = costs.spec.num_layers * costs.h2d(point.decode_streamed_bytes(
        costs.spec, costs.dtype))  # fmt: skip
    match schedule:
        case ScheduleName.CGOPIPE:
            return terms
        case ScheduleName.FASTDECODE:
            return (*terms, lanes[Lane.H2D] + lanes[Lane.GPU])
        case ScheduleName.FLEXGEN | ScheduleName.FLEXGEN_C:
            n = point.num_micro_batches
            on_cpu = (n > point.gpu_kv_micro_batches) * (1 - point.gpu_attention)
            small = lanes[Lane.H2D] - weights
            in_turn = lanes[Lane.GPU] + lanes[Lane.CPU] + lanes[Lane.D2H] + small
            # The first micro-batch's attention runs while the weights load.
            serial = weights + in_turn * (n - 1) / n
            return (
                *terms,
                where(on_cpu, serial, weights + small),
                where(on_cpu, in_turn, weights + lanes[Lane.GPU]),
                where(on_cpu, in_turn, weights + lanes[Lane.CPU]),
            )
        case ScheduleName.DEEPSPEED:
            busy = lanes[Lane.GPU] + lanes[Lane.CPU] + lanes[Lane.D2H]
            return (*terms, weights, busy + lanes[Lane.H2D] - weights)


def _chain_seconds(costs: Costs, point: Point, context: Number) -> Number:
    """Seconds of a step in which each micro-batch waits for the one LOOKAHEAD before it.

    A micro-batch's layer is a chain of tasks, and no more than LOOKAHEAD chains are in flight.
    """
    n, one = point.num_micro_batches, _MicroBatch.of_point(costs, point, context)
    chain = one.gpu_s + one.cpu_s + one.to_gpu_s + one.to_host_s
    in_flight = -maximum(-n, -LOOKAHEAD)
    return costs.spec.num_layers * n / in_flight * chain


def prefill_lanes(costs: Costs, point: Point, workload: Workload) -> dict[Lane, Number]:
    """Seconds of work in each lane in the prefill of one batch."""
    spec, dtype, layers = costs.spec, costs.dtype, costs.spec.num_layers
    tokens = point.batch_size * workload.prompt_len
    chunk = -maximum(-point.chunk_tokens, -tokens)
    chunks = tokens / chunk
    hidden = operators.hidden_bytes(spec, dtype, chunk)
    off_gpu = 1 - point.gpu_kv_micro_batches / point.num_micro_batches
    h2d = costs.h2d(point.streamed_bytes(spec, dtype)) + chunks * costs.h2d(hidden)
    stored_kv = off_gpu * costs.d2h(operators.kv_bytes(spec, dtype, chunk))
    gpu = chunks * costs.prefill_layer(chunk, workload.prompt_len)
    return {
        Lane.GPU: layers * gpu + chunks * costs.sample(point.batch_size / chunks),
        Lane.H2D: layers * h2d,
        Lane.D2H: chunks * (layers * stored_kv + (layers - 1) * costs.d2h(hidden)),
        Lane.STAGE: layers * point.staging * costs.stage(point.streamed_bytes(spec, dtype)),
    }


def batch_terms(
    costs: Costs, point: Point, schedule: ScheduleName, workload: Workload
) -> list[tuple[float, tuple[Number, ...]]]:
    """What prefill and decode of one batch are made of: weights, each with terms.

    A batch's time is the sum of every weight times the longest of its terms. The first is prefill;
    the others are decode steps, whose context grows by a token a step: a step's time is a maximum
    of lines in the context, so Simpson's rule over three contexts is within a fraction of a per
    cent of the sum over all of them.
    """
    first = workload.prompt_len + 1
    last = workload.prompt_len + max(workload.decode_steps, 1)
    return [
        (1.0, tuple(prefill_lanes(costs, point, workload).values())),
        *(
            (workload.decode_steps * share / 6, step_terms(costs, point, schedule, context))
            for share, context in ((1, first), (4, (first + last) / 2), (1, last))
        ),
    ]


def batch_seconds(
    costs: Costs, point: Point, schedule: ScheduleName, workload: Workload
) -> tuple[Number, Number]:
    """Prefill and decode seconds of one batch."""
    (_, prefill), *steps = batch_terms(costs, point, schedule, workload)
    return maximum(*prefill), sum(weight * maximum(*terms) for weight, terms in steps)
