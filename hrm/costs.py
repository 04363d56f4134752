"""Seconds of every task of a model on a machine, for one policy or for a grid of them."""

from collections.abc import Callable
from dataclasses import dataclass

from hrm import operators
from hrm.hardware import HardwareProfile, Link, MemoryLevel
from hrm.model_spec import ModelSpec
from hrm.numeric import Number
from hrm.policy import Policy
from hrm.roofline import operator_seconds
from hrm.schedules import Pipeline
from hrm.tasks import Device, Phase, TaskId, TaskKind
from hrm.units import DTYPE_BYTES


@dataclass(frozen=True, slots=True)
class Costs:
    """What tasks cost on `profile`; m is the requests in a micro-batch."""

    spec: ModelSpec
    profile: HardwareProfile
    dtype: str

    def level(self, device: Device) -> MemoryLevel:
        """The memory level that a device computes at."""
        return self.profile.top if device is Device.GPU else self.profile.host

    def pre_attention(self, m: Number) -> Number:
        """Norm, projections and rotary embedding on the GPU."""
        return self._on(Device.GPU, operators.pre_attention(self.spec, self.dtype, m))

    def attention(self, device: Device, m: Number, context: Number) -> Number:
        """Decode attention over a mean context on either device."""
        return self._on(device, operators.decode_attention(self.spec, self.dtype, m, context))

    def post_attention(self, m: Number, gpu_experts: Number) -> Number:
        """Output projection, router and `gpu_experts` of the experts on the GPU."""
        return self._on(Device.GPU, operators.post_attention(self.spec, self.dtype, m, gpu_experts))

    def cpu_experts(self, m: Number, num_experts: Number) -> Number:
        """`num_experts` of the experts on the CPU."""
        return self._on(Device.CPU, operators.experts(self.spec, self.dtype, m, num_experts))

    def sample(self, m: Number) -> Number:
        """LM head and choice of the next token on the GPU."""
        return self._on(Device.GPU, operators.sample(self.spec, self.dtype, m))

    def prefill_layer(self, tokens: Number, prompt_len: Number) -> Number:
        """One layer of prefill over a chunk on the GPU."""
        return self._on(
            Device.GPU, operators.prefill_layer(self.spec, self.dtype, tokens, prompt_len)
        )

    def h2d(self, num_bytes: Number, num_transfers: Number = 1) -> Number:
        """Host to device; nothing on a machine without an accelerator."""
        return self._over("h2d", num_bytes, num_transfers)

    def d2h(self, num_bytes: Number, num_transfers: Number = 1) -> Number:
        """Device to host."""
        return self._over("d2h", num_bytes, num_transfers)

    def stage(self, num_bytes: Number, num_transfers: Number = 1) -> Number:
        """Pageable to pinned memory, within the host."""
        host = self.profile.host.name
        if not self.profile.has_accelerator:
            return 0 * num_bytes
        return self.profile.link(host, host, "staging").seconds(num_bytes, num_transfers)

    def _on(self, device: Device, operator: operators.Operator) -> Number:
        return operator_seconds(operator, self.level(device), self.dtype)

    def _over(self, direction: str, num_bytes: Number, num_transfers: Number) -> Number:
        if not self.profile.has_accelerator:
            return 0 * num_bytes
        link: Link = self.profile.h2d if direction == "h2d" else self.profile.d2h
        return link.seconds(num_bytes, num_transfers)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskWork:
    """Bytes and seconds of each task of one phase under one policy.

    In decode, `tokens` is the mean number of requests in a micro-batch and `context` their mean
    context; in prefill, `tokens` is prompt tokens in a chunk and `context` the mean prompt length.
    `mean_residents` are resident experts where a layer of the work stands for several of the
    policy's; if it is empty, layers are the policy's own.
    """

    costs: Costs
    policy: Policy
    pipeline: Pipeline
    tokens: float
    context: float
    requests_per_chunk: float = 0.0
    mean_residents: tuple[float, ...] = ()

    @property
    def resident_experts(self) -> tuple[float, ...]:
        """Experts that stay on the GPU, for each layer of the work."""
        return self.mean_residents or self.policy.resident_experts

    def num_bytes(self, task: TaskId) -> int:
        """Bytes that the task moves; 0 if it computes."""
        spec, dtype, m = self.costs.spec, self.costs.dtype, self.tokens
        match task.kind:
            case TaskKind.EMBED | TaskKind.STORE_HIDDEN | TaskKind.LOAD_EXPERT_OUTPUT:
                moved = operators.hidden_bytes(spec, dtype, m)
            case TaskKind.LOAD_HIDDEN if self.pipeline.phase is Phase.PREFILL:
                moved = operators.hidden_bytes(spec, dtype, m)
            case TaskKind.LOAD_HIDDEN:
                moved = operators.attention_output_bytes(spec, dtype, m)
            case TaskKind.OFFLOAD_QKV:
                moved = operators.qkv_bytes(spec, dtype, m)
            case TaskKind.OFFLOAD_TOKENS:
                moved = operators.routed_token_bytes(spec, dtype, m)
            case TaskKind.STORE_KV:
                moved = operators.kv_bytes(spec, dtype, m)
            case TaskKind.LOAD_KV:
                moved = operators.kv_bytes(spec, dtype, m * self.context)
            case TaskKind.LOAD_PAGE | TaskKind.STAGE_PAGE:
                moved = self._streamed_bytes(task.layer) / self.pipeline.num_pages
            case _:
                moved = 0
        return round(moved)

    def _streamed_bytes(self, layer: int) -> float:
        """Weight bytes of a layer that are loaded in this phase."""
        spec, policy = self.costs.spec, self.policy
        on_cpu = policy.ffn is Device.CPU and self.pipeline.phase is Phase.DECODE
        loaded = 0.0 if on_cpu else spec.num_experts - self.resident_experts[layer]
        dense = 0 if policy.resident_dense else spec.dense_parameters
        return (loaded * spec.expert_parameters + dense) * DTYPE_BYTES[policy.dtype]

    def seconds_of(self) -> Callable[[TaskId], float]:
        """A function from task to seconds; tasks alike are worked out once."""
        known: dict[tuple[TaskKind, float, bool], float] = {}

        def seconds(task: TaskId) -> float:
            in_decode = self.pipeline.phase is Phase.DECODE
            attention = in_decode and task.kind is TaskKind.ATTENTION
            on_cpu = attention and self.pipeline.attention_on_cpu(task.micro_batch)
            key = (task.kind, self.resident_experts[task.layer], on_cpu)
            if key not in known:
                known[key] = self._seconds(task, on_cpu=on_cpu)
            return known[key]

        return seconds

    def _seconds(self, task: TaskId, *, on_cpu: bool) -> float:
        costs, m, resident = self.costs, self.tokens, self.resident_experts[task.layer]
        match task.kind:
            case TaskKind.PRE_ATTENTION:
                return costs.pre_attention(m)
            case TaskKind.ATTENTION:
                return costs.attention(Device.CPU if on_cpu else Device.GPU, m, self.context)
            case TaskKind.POST_ATTENTION:
                on_gpu = resident if self.policy.ffn is Device.CPU else costs.spec.num_experts
                return costs.post_attention(m, on_gpu)
            case TaskKind.CPU_EXPERTS:
                return costs.cpu_experts(m, costs.spec.num_experts - resident)
            case TaskKind.PREFILL_LAYER:
                return costs.prefill_layer(m, self.context)
            case TaskKind.SAMPLE:
                return costs.sample(self.requests_per_chunk or m)
            case TaskKind.STAGE_PAGE:
                return costs.stage(self.num_bytes(task))
            case (
                TaskKind.OFFLOAD_QKV
                | TaskKind.OFFLOAD_TOKENS
                | TaskKind.STORE_KV
                | TaskKind.STORE_HIDDEN
            ):
                return costs.d2h(self.num_bytes(task))
            case _:
                return costs.h2d(self.num_bytes(task))
