"""Seconds of every task of a model on a machine, for one policy or for a grid of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Final

from hrm import operators
from hrm.contract.temporaries import skips_in_last_layer
from hrm.hardware import HardwareProfile, Link, LinkKind, MemoryLevel
from hrm.model_spec import LayerKind, ModelSpec
from hrm.numeric import Number, maximum, minimum
from hrm.policy import Policy
from hrm.roofline import operator_seconds
from hrm.schedules import Pipeline
from hrm.tasks import Device, Phase, TaskId, TaskKind
from hrm.units import DTYPE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What an implementation adds to its schedule; the default is this project's executor.

    `weights_link` and `kv_link` are what weights and the KV cache cross on their way to the GPU.
    `attention_passes` is how many bytes the CPU moves for each byte of the cache that it attends
    over: more than one where the cache is copied or converted first. `synchronise_s` is added to
    every task on the GPU. With `whole_last_layer` prefill computes the model's last layer for all
    tokens, though few of them are looked at. With `fused_kernels` each norm and rotary embedding
    and all experts of a layer are one kernel on every processor; else the profile says so of each.
    """

    weights_link: LinkKind = "pinned"
    kv_link: LinkKind = "pinned"
    attention_passes: float = 1.0
    synchronise_s: float = 0.0
    whole_last_layer: bool = False
    fused_kernels: bool = False


EXECUTOR: Final = Runtime()


@dataclass(frozen=True, slots=True)
class Costs:
    """What tasks cost on `profile`; m is the requests in a micro-batch.

    The GPUs of a machine with several work in tensor parallel: two all-reduces a layer join the
    compute of post-attention, and what every GPU needs whole crosses every link.
    """

    spec: ModelSpec
    profile: HardwareProfile
    dtype: str
    runtime: Runtime = EXECUTOR

    def level(self, device: Device) -> MemoryLevel:
        """The memory level that a device computes at."""
        return self.profile.top if device is Device.GPU else self.profile.host

    def mean_over_layers(self, seconds_of: Callable[[LayerKind], Number], *, by_window: bool = True) -> Number:
        """`seconds_of` each kind of layer, weighted by how many there are.

        Without `by_window` it is asked once for kinds that differ by their window only.
        """
        kinds = self.spec.layer_kinds()
        if not by_window:
            of_any_window: dict[LayerKind, int] = {}
            for kind, count in kinds.items():
                alike = LayerKind(kind.has_experts)
                of_any_window[alike] = of_any_window.get(alike, 0) + count
            kinds = of_any_window
        if len(kinds) == 1:
            return seconds_of(next(iter(kinds)))
        return sum(count * seconds_of(kind) for kind, count in kinds.items()) / self.spec.num_layers

    def pre_attention(self, m: Number) -> Number:
        """Norm, projections and rotary embedding on the GPU."""
        return self._on(Device.GPU, operators.pre_attention(self.spec, self.dtype, m))

    def attention(self, device: Device, m: Number, context: Number, kind: LayerKind) -> Number:
        """Decode attention over a mean context on either device."""
        operator = operators.decode_attention(self.spec, self.dtype, m, context, kind)
        if device is Device.CPU and self.runtime.attention_passes > 1:
            operator = operator.with_passes(self.runtime.attention_passes)
        return self._on(device, operator)

    def post_attention(self, m: Number, gpu_experts: Number, kind: LayerKind) -> Number:
        """Output projection, router and `gpu_experts` of the experts on the GPU."""
        return self._after_attention(m, gpu_experts, kind) + self.runtime.synchronise_s

    def cpu_experts(self, m: Number, num_experts: Number) -> Number:
        """`num_experts` of the experts on the CPU."""
        return self._on(Device.CPU, operators.experts(self.spec, self.dtype, m, num_experts))

    def sample(self, m: Number) -> Number:
        """LM head and choice of the next token on the GPU."""
        return self._on(Device.GPU, operators.sample(self.spec, self.dtype, m))

    def first_tokens(self, requests: Number) -> Number:
        """The same after a chunk in which so many prompts end, as a mean over chunks.

        With fewer than one, that share of the chunks has one and the others nothing to choose.
        """
        return minimum(requests, 1) * self.sample(maximum(requests, 1))

    def prefill_layer(self, tokens: Number, prompt_len: float, kind: LayerKind, *, is_last: bool = False) -> Number:
        """One layer of prefill over a chunk on the GPU; `is_last` of the model."""
        before = self._up_to_attention(tokens, prompt_len, kind)
        if is_last and self.skips_in_last_layer(prompt_len):
            return before + self._after_ends(tokens / prompt_len, kind)
        return before + self._after_attention(tokens, self.spec.num_experts, kind)

    def prefill_layers(self, tokens: Number, prompt_len: float) -> Number:
        """All layers of prefill over a chunk on the GPU, as a mean over chunks."""

        @cache
        def after(kind: LayerKind) -> Number:
            return self._after_attention(tokens, self.spec.num_experts, kind)

        seconds = self.spec.num_layers * (
            self.mean_over_layers(lambda kind: self._up_to_attention(tokens, prompt_len, kind))
            + self.mean_over_layers(after, by_window=False)
        )
        if not self.skips_in_last_layer(prompt_len):
            return seconds
        last = LayerKind(self.spec.layer_kind(self.spec.num_layers - 1).has_experts)
        return seconds + self._after_ends(tokens / prompt_len, last) - after(last)

    def skips_in_last_layer(self, prompt_len: float) -> bool:
        """Whether prefill's last layer goes on after attention with the ends of prompts only.

        In a pipeline only that of the last stage does, and the other stages are waited for.
        """
        whole = self.runtime.whole_last_layer or self.profile.num_stages > 1
        return not whole and skips_in_last_layer(1, prompt_len)

    def all_reduce(self, tokens: Number) -> Number:
        """Sum of the GPUs' hidden states of so many tokens, in a ring; nothing for one GPU.

        2·(g - 1) steps, each moving a g-th of the bytes over every GPU's link at once.
        """
        gpus = self.profile.num_gpus
        if gpus == 1:
            return 0 * tokens
        link = self.profile.peer
        part = operators.hidden_bytes(self.spec, self.dtype, tokens) / gpus
        return 2 * (gpus - 1) * link.seconds(part)

    def h2d(self, num_bytes: Number, num_transfers: Number = 1) -> Number:
        """Host to device; nothing on a machine without an accelerator."""
        return self._over("h2d", num_bytes, num_transfers)

    def h2d_to_all(self, num_bytes: Number) -> Number:
        """The same bytes to every GPU."""
        return self._over("h2d", num_bytes * self.profile.num_gpus, 1)

    def load_weights(self, num_bytes: Number, num_transfers: Number = 1) -> Number:
        """Weights from the host to the GPU."""
        return self._to_gpu(self.runtime.weights_link, num_bytes, num_transfers)

    def load_kv(self, num_bytes: Number) -> Number:
        """KV cache from the host to the GPU."""
        return self._to_gpu(self.runtime.kv_link, num_bytes, 1)

    def d2h(self, num_bytes: Number, num_transfers: Number = 1) -> Number:
        """Device to host."""
        return self._over("d2h", num_bytes, num_transfers)

    def stage(self, num_bytes: Number, num_transfers: Number = 1) -> Number:
        """Pageable to pinned memory, within the host."""
        host = self.profile.host.name
        if not self.profile.has_accelerator:
            return 0 * num_bytes
        return self.profile.link(host, host, "staging").seconds(num_bytes, num_transfers)

    def host_memory(self, *, moved_bytes: Number, read_bytes: Number) -> Number:
        """Seconds that the host's memory needs for all its users together.

        `moved_bytes` cross a link and `read_bytes` are read or written by the processor.
        """
        if not self.profile.has_accelerator:
            return 0 * moved_bytes
        accesses = self.profile.host_accesses_a_transferred_byte * moved_bytes + read_bytes
        return accesses / self.profile.host.together_bytes_per_s

    def _on(self, device: Device, operator: operators.Operator) -> Number:
        seconds = self._seconds(operator, self.level(device))
        return seconds + self.runtime.synchronise_s if device is Device.GPU else seconds

    def _seconds(self, operator: operators.Operator, level: MemoryLevel) -> Number:
        return operator_seconds(operator, level, self.dtype, fused=self.runtime.fused_kernels)

    def _up_to_attention(self, tokens: Number, prompt_len: float, kind: LayerKind) -> Number:
        """A layer of prefill up to attention."""
        operator = operators.prefill_attention(self.spec, self.dtype, tokens, prompt_len, kind)
        return self._on(Device.GPU, operator)

    def _after_ends(self, requests: Number, kind: LayerKind) -> Number:
        """The rest of a layer for the last tokens of so many prompts, as `first_tokens` of them."""
        rest = self._after_attention(maximum(requests, 1), self.spec.num_experts, kind)
        return minimum(requests, 1) * rest

    def _after_attention(self, m: Number, gpu_experts: Number, kind: LayerKind) -> Number:
        operator = operators.post_attention(self.spec, self.dtype, m, gpu_experts, kind)
        return self._seconds(operator, self.profile.top) + 2 * self.all_reduce(m)

    def _to_gpu(self, kind: LinkKind, num_bytes: Number, num_transfers: Number) -> Number:
        if not self.profile.has_accelerator:
            return 0 * num_bytes
        host, top = self.profile.host.name, self.profile.top.name
        return self.profile.link(host, top, kind).seconds(num_bytes, num_transfers)

    def _over(self, direction: str, num_bytes: Number, num_transfers: Number) -> Number:
        if not self.profile.has_accelerator:
            return 0 * num_bytes
        link: Link = self.profile.h2d if direction == "h2d" else self.profile.d2h
        return link.seconds(num_bytes, num_transfers)


LayerMix = tuple[tuple[LayerKind, float], ...]
_ON_GPU: Final = frozenset(
    {TaskKind.PRE_ATTENTION, TaskKind.ATTENTION, TaskKind.POST_ATTENTION, TaskKind.PREFILL_LAYER, TaskKind.SAMPLE}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskWork:
    """Bytes and seconds of each task of one phase under one policy.

    In decode, `tokens` is the mean number of requests in a micro-batch and `context` their mean
    context; in prefill, `tokens` is prompt tokens in a chunk and `context` the mean prompt length.
    Where a layer of the work stands for several of the policy's, `mean_residents` are its resident
    experts and `layer_mixes` the shares of the kinds that it stands for; if they are empty, layers
    are the policy's own. Tasks that use the host's memory take `stretch` times their seconds, where
    together they want more of it than it gives.
    """

    costs: Costs
    policy: Policy
    pipeline: Pipeline
    tokens: float
    context: float
    requests_per_chunk: float | None = None
    mean_residents: tuple[float, ...] = ()
    layer_mixes: tuple[LayerMix, ...] = ()
    stretch: float = 1.0

    @property
    def resident_experts(self) -> tuple[float, ...]:
        """Experts that stay on the GPU, for each layer of the work."""
        return self.mean_residents or self.policy.resident_experts

    def layer_mix(self, layer: int) -> LayerMix:
        """The kinds of layer that this one stands for, with their shares."""
        if self.layer_mixes:
            return self.layer_mixes[layer]
        return ((self.costs.spec.layer_kind(layer), 1.0),)

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
                moved = sum(
                    share * operators.kv_bytes(spec, dtype, m * spec.context_in(kind, self.context))
                    for kind, share in self.layer_mix(task.layer)
                )
            case TaskKind.LOAD_PAGE | TaskKind.STAGE_PAGE:
                moved = self._streamed_bytes(task.layer) / self.pipeline.num_pages
            case _:
                moved = 0
        return round(moved)

    def _streamed_bytes(self, layer: int) -> float:
        """Weight bytes of a layer that are loaded in this phase."""
        spec, policy = self.costs.spec, self.policy
        on_cpu = policy.ffn is Device.CPU and self.pipeline.phase is Phase.DECODE
        elements = 0.0
        for kind, share in self.layer_mix(layer):
            if not on_cpu:
                elements += share * spec.num_experts_of(kind) * spec.expert_parameters
            if not policy.resident_dense:
                elements += share * spec.dense_parameters_of(kind)
        if not on_cpu:
            elements -= self.resident_experts[layer] * spec.expert_parameters
        return elements * DTYPE_BYTES[policy.dtype]

    def seconds_of(self) -> Callable[[TaskId], float]:
        """A function from task to seconds; tasks alike are worked out once."""
        in_decode = self.pipeline.phase is Phase.DECODE
        alike: dict[tuple[float, LayerMix, bool], dict[TaskKind, float]] = {}
        off_gpu: dict[tuple[float, LayerMix, bool], dict[TaskKind, float]] = {}
        num_layers = self.pipeline.num_layers
        layers = [
            (alike.setdefault(key, {}), off_gpu.setdefault(key, {}))
            for key in zip(
                self.resident_experts,
                map(self.layer_mix, range(num_layers)),
                [not in_decode and layer == num_layers - 1 for layer in range(num_layers)],
                strict=False,  # a policy may be simulated over its first layers only
            )
        ]

        def seconds(task: TaskId) -> float:
            kind = task.kind
            on_cpu = kind is TaskKind.ATTENTION and in_decode and self.pipeline.attention_on_cpu(task.micro_batch)
            known = layers[task.layer][on_cpu]
            if kind not in known:
                whole = self._seconds(task, self.layer_mix(task.layer), on_cpu=on_cpu)
                on_gpu = kind in _ON_GPU and not on_cpu
                known[kind] = whole if on_gpu else whole * self.stretch
            return known[kind]

        return seconds

    def _seconds(self, task: TaskId, mix: LayerMix, *, on_cpu: bool) -> float:
        return sum(share * self._seconds_in(task, kind, on_cpu=on_cpu) for kind, share in mix)

    def _seconds_in(self, task: TaskId, kind: LayerKind, *, on_cpu: bool) -> float:
        """Seconds of the task in a layer of that kind; 0 where there is no such task."""
        costs, m, resident = self.costs, self.tokens, self.resident_experts[task.layer]
        match task.kind:
            case TaskKind.PRE_ATTENTION:
                return costs.pre_attention(m)
            case TaskKind.ATTENTION:
                return costs.attention(Device.CPU if on_cpu else Device.GPU, m, self.context, kind)
            case TaskKind.POST_ATTENTION:
                on_gpu = resident if self.policy.ffn is Device.CPU else costs.spec.num_experts
                return costs.post_attention(m, on_gpu, kind)
            case TaskKind.CPU_EXPERTS:
                on_host = max(0.0, costs.spec.num_experts_of(kind) - resident)
                return costs.cpu_experts(m, on_host)
            case TaskKind.PREFILL_LAYER:
                is_last = task.layer == self.pipeline.num_layers - 1
                return costs.prefill_layer(m, self.context, kind, is_last=is_last)
            case TaskKind.SAMPLE if self.pipeline.phase is Phase.PREFILL:
                return costs.first_tokens(m if self.requests_per_chunk is None else self.requests_per_chunk)
            case TaskKind.SAMPLE:
                return costs.sample(m)
            case TaskKind.STAGE_PAGE:
                return costs.stage(self.num_bytes(task))
            case TaskKind.LOAD_PAGE:
                return costs.load_weights(self.num_bytes(task))
            case TaskKind.LOAD_KV:
                return costs.load_kv(self.num_bytes(task))
            case TaskKind.OFFLOAD_QKV | TaskKind.OFFLOAD_TOKENS | TaskKind.STORE_KV | TaskKind.STORE_HIDDEN:
                return costs.d2h(self.num_bytes(task))
            case TaskKind.EMBED | TaskKind.LOAD_EXPERT_OUTPUT:
                return costs.h2d_to_all(self.num_bytes(task))
            case TaskKind.LOAD_HIDDEN if self.pipeline.phase is Phase.PREFILL:
                return costs.h2d_to_all(self.num_bytes(task))
            case _:
                return costs.h2d(self.num_bytes(task))
