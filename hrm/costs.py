"""Seconds of every task of a model on a machine, for one policy or for a grid of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from hrm import operators
from hrm.acts import Load
from hrm.contention import ALONE, Stretch
from hrm.contract.rows import INTEGER_BYTES, LOGIT_BYTES
from hrm.contract.temporaries import skips_in_last_layer
from hrm.formats import Formats
from hrm.hardware import HardwareProfile, LinkKind, MemoryLevel
from hrm.layers import Layer, Operator
from hrm.model_spec import ModelSpec
from hrm.numeric import Number, maximum, minimum
from hrm.placement import Place
from hrm.policy import Policy
from hrm.roofline import operator_seconds
from hrm.schedules import Pipeline
from hrm.shared_cores import SharedCores
from hrm.tasks import Act, Device, Lane, TaskId


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What an implementation adds to its schedule; the default is this project's executor.

    `weights_link` and `kv_link` are what weights and the KV cache cross on their way to the GPU.
    `attention_passes` is how many bytes the CPU moves for each byte of the cache that it attends
    over: more than one where the cache is copied or converted first. `synchronise_s` is added to
    every task on the GPU. With `whole_last_layer` prefill computes the model's last layer for all
    tokens, though few of them are looked at. With `fused_kernels` each norm and rotary embedding
    and all experts of a layer are one kernel on every processor, which multiplies by packed weights as they
    are; else the profile says so of each, and GPUs whose kernels are not fused write packed weights out first.
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

    They are those of one part of both: of several GPUs in tensor parallel one rank's, which sums up with
    the others over their links.
    """

    spec: ModelSpec
    profile: HardwareProfile
    formats: Formats
    runtime: Runtime = EXECUTOR

    def level(self, device: Device) -> MemoryLevel:
        """The memory level that a device computes at."""
        return self.profile.top if device is Device.GPU else self.profile.host

    @property
    def expert_bytes(self) -> Number:
        """Weight bytes of one routed expert."""
        return self.spec.expert_bytes(self.formats.weights)

    def pre_attention(self, m: Number, kind: Layer) -> Number:
        """Norm, projections and rotary embedding on the GPU."""
        return self._on(Device.GPU, kind.project(self.formats, m))

    def attention(self, device: Device, m: Number, context: Number, kind: Layer) -> Number:
        """Decode attention over a mean context on either device."""
        operator = kind.mixer.attend(self.formats, m, context)
        if device is Device.CPU and self.runtime.attention_passes > 1:
            operator = operator.with_passes(self.runtime.attention_passes)
        return self._on(device, operator)

    def post_attention(self, m: Number, gpu_experts: Number, kind: Layer) -> Number:
        """Output projection, router and `gpu_experts` of the experts on the GPU; of a rank without the projection."""
        return self.after_attention(m, gpu_experts, kind) + self.runtime.synchronise_s

    def after_attention(self, m: Number, gpu_experts: Number, kind: Layer) -> Number:
        """What follows attention on the GPU, without the time to synchronise."""
        work = kind.after_attention if self.spec.ranks == 1 else kind.feed_forward
        return self._seconds(work(self.formats, m, gpu_experts), self.profile.top)

    def output_projection(self, m: Number, kind: Layer) -> Number:
        """What attention returns, projected by one of several ranks."""
        return self._on(Device.GPU, kind.finish(self.formats, m))

    def cpu_experts(self, m: Number, num_experts: Number) -> Number:
        """`num_experts` of the experts on the CPU."""
        return self._on(Device.CPU, self.spec.expert_kind.run_experts(self.formats, m, num_experts))

    def part_experts(self, m: Number, num_experts: Number) -> Number:
        """`num_experts` of the experts on the GPU, by themselves."""
        return self._on(Device.GPU, self.spec.expert_kind.run_experts(self.formats, m, num_experts))

    def sample(self, m: Number) -> Number:
        """LM head and choice of the next token on the GPU, or what a stage without the head does instead."""
        if not self.spec.has_head:
            return self.hand_on(m)
        return self._on(Device.GPU, operators.sample(self.spec, self.formats, m)) + self.exchange_logits(m)

    def sample_first(self, tokens: Number, requests: Number) -> Number:
        """The same of a chunk in prefill, in which so many prompts end; a stage without the head hands on all of it."""
        return self.of_ends(requests, self.sample) if self.spec.has_head else self.hand_on(tokens)

    def hand_on(self, tokens: Number) -> Number:
        """Hidden states to the host, from where they go to the next stage."""
        return self.d2h(operators.hidden_bytes(self.spec, self.formats, tokens))

    @staticmethod
    def of_ends(requests: Number, work: Callable[[Number], Number]) -> Number:
        """`work` over the ends of so many prompts in a chunk, as a mean over chunks.

        With fewer than one, that share of the chunks has one and the others nothing to do.
        """
        return minimum(requests, 1) * work(maximum(requests, 1))

    def prefill_layer(self, x: Load) -> Number:
        """One layer of prefill over a chunk on the GPU, with `gpu_experts` of the experts.

        Of a rank it is what comes after the output projection.
        """
        alike = x.kind.without_window

        def rest(tokens: Number) -> Number:
            return self.after_attention(tokens, x.gpu_experts, alike)

        after = self.going_on(x, rest) if x.is_last else x.once(alike, lambda: rest(x.tokens))
        return after if self.spec.ranks > 1 else self._before(x) + after

    def prefill_attention(self, x: Load) -> Number:
        """What a rank does of a layer of prefill up to the output projection."""
        return self._before(x) + self.going_on(x, lambda tokens: self.output_projection(tokens, x.kind))

    def _before(self, x: Load) -> Number:
        return x.once((x.kind, "before"), lambda: self._up_to_attention(x.tokens, x.context, x.kind))

    def going_on(self, x: Load, work: Callable[[Number], Number]) -> Number:
        """`work` over the tokens of a chunk that a layer goes on with after attention, as a mean over chunks.

        In the last layer they may be the ends of prompts only.
        """
        if not (x.is_last and self.skips_in_last_layer(float(x.context))):
            return work(x.tokens)
        return self.of_ends(x.tokens / x.context, work)

    def skips_in_last_layer(self, prompt_len: float) -> bool:
        """Whether prefill's last layer goes on after attention with the ends of prompts only.

        In a pipeline only that of the last stage does, and the other stages are waited for.
        """
        whole = self.runtime.whole_last_layer or self.profile.num_stages > 1
        return not whole and skips_in_last_layer(1, prompt_len)

    @property
    def prefills_in_turn(self) -> float:
        """How many times as long as its own prefill a batch takes before tokens come; more than 1 in a pipeline.

        Of the batches under way together the first comes to the last of S stages when S - 1 others have prefilled it,
        each but for its last layer, of which chunks go on one by one. The last stage waits so long once for all of
        them, and the first one later, for tokens.
        """
        stages = self.profile.num_stages
        return 1 + (stages - 1) / stages * (1 - 1 / self.spec.num_layers)

    def all_reduce(self, tokens: Number) -> Number:
        """Sum of the GPUs' outputs of a block for so many tokens, in a ring; nothing for one GPU.

        2·(g - 1) steps, each moving a g-th of the bytes over every GPU's link at once.
        """
        ranks = self.spec.ranks
        if ranks == 1:
            return 0.0
        part = self.formats.compute.bytes_of(tokens, self.spec.hidden_size) / ranks
        return 2 * (ranks - 1) * self.profile.peer.seconds(part)

    def exchange_logits(self, m: Number) -> Number:
        """Every rank gets whole logits of its share of m requests, and tells the others what it chose.

        Each of ranks - 1 steps moves what one rank has for another, and so much as the tokens; nothing for one GPU.
        """
        ranks = self.spec.ranks
        if ranks == 1:
            return 0.0
        part = m / ranks * self.spec.vocab_size * LOGIT_BYTES
        return (ranks - 1) * (self.profile.peer.seconds(part) + self.profile.peer.seconds(m / ranks * INTEGER_BYTES))

    def h2d(self, num_bytes: Number) -> Number:
        """Host to device; like all transfers, nothing on a machine without an accelerator."""
        return self._over(self.profile.host, self.profile.top, "pinned", num_bytes)

    def load_weights(self, num_bytes: Number) -> Number:
        """Weights from the host to the GPU."""
        return self._over(self.profile.host, self.profile.top, self.runtime.weights_link, num_bytes)

    def load_kv(self, num_bytes: Number) -> Number:
        """KV cache from the host to the GPU."""
        return self._over(self.profile.host, self.profile.top, self.runtime.kv_link, num_bytes)

    def d2h(self, num_bytes: Number) -> Number:
        """Device to host."""
        return self._over(self.profile.top, self.profile.host, "pinned", num_bytes)

    def stage(self, num_bytes: Number) -> Number:
        """Pageable to pinned memory, within the host."""
        return self._over(self.profile.host, self.profile.host, "staging", num_bytes)

    def accessed_bytes(self, act: Act, load: Load, moved_bytes: Number) -> Number:
        """What a task that moves so much reads and writes in the host's memory; nothing where all is on one level."""
        if act.lane is Lane.GPU or not self.profile.has_accelerator:
            return 0
        if act.lane.is_link:
            return self.profile.host_accesses_a_transferred_byte * moved_bytes
        return act.host_bytes(load)

    def host_memory(self, accessed_bytes: Number) -> Number:
        """Seconds that the host's memory needs at least to read and write so much."""
        return accessed_bytes / self.profile.host.together_bytes_per_s

    @property
    def hand_over_s(self) -> float:
        """Seconds until the thread of a lane knows what that of another has done; 0 where it was not measured.

        That is a part of running a task, and on a core that all lanes share nearly all of it.
        """
        shared = self.profile.lane_threads
        return 0.0 if shared is None else shared.task_s.value

    @property
    def shared_cores(self) -> SharedCores | None:
        """The cores that lanes compute on which want more of them than there are; None where none has to wait."""
        lanes, threads = self.profile.lane_threads, self._threads
        if lanes is None or not self.profile.has_accelerator or sum(threads.values()) <= lanes.cores:
            return None
        return SharedCores(lanes.cores, threads)

    @property
    def _threads(self) -> dict[Lane, int]:
        """How many cores each lane keeps busy while it computes, where lanes are the host's threads."""
        return {Lane.GPU: self.profile.top.processor.cores, Lane.CPU: self.profile.host.processor.cores}

    def running(self, num_tasks: Number) -> Number | None:
        """Seconds of all cores that lanes share in which so many tasks are run; None where it was not measured."""
        shared = self.profile.lane_threads
        return None if shared is None else num_tasks * shared.task_s.value / shared.cores

    def computing(self, *, gpu_s: Number, cpu_s: Number) -> Number:
        """Seconds of all cores that lanes share in which the GPU's and the CPU's lane compute for so long."""
        lanes, threads = self.profile.lane_threads, self._threads
        assert lanes is not None
        return (gpu_s * threads[Lane.GPU] + cpu_s * threads[Lane.CPU]) / lanes.cores

    def _on(self, device: Device, operator: Operator) -> Number:
        seconds = self._seconds(operator, self.level(device))
        synchronises = device is Device.GPU and self.runtime.synchronise_s > 0
        return seconds + self.runtime.synchronise_s if synchronises else seconds

    def _seconds(self, operator: Operator, level: MemoryLevel) -> Number:
        writes_out = self.profile.has_gpu and level is self.profile.top
        fused = self.runtime.fused_kernels
        return operator_seconds(operator, level, self.formats.compute.name, fused=fused, writes_out=writes_out)

    def _up_to_attention(self, tokens: Number, prompt_len: Number, kind: Layer) -> Number:
        """A layer of prefill up to attention."""
        operator = kind.prefill(self.formats, tokens, prompt_len)
        return self._on(Device.GPU, operator)

    def _over(self, source: MemoryLevel, target: MemoryLevel, kind: LinkKind, num_bytes: Number) -> Number:
        if not self.profile.has_accelerator:
            return 0 * num_bytes
        return self.profile.link(source.name, target.name, kind).seconds(num_bytes)


class TaskSeconds(NamedTuple):
    """What a task takes by itself, and how long the host's memory needs for what it accesses."""

    alone_s: float
    at_memory_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskWork:
    """Bytes and seconds of each task of one phase under one policy.

    In decode, `tokens` is the mean number of requests in a micro-batch and `context` their mean
    context; in prefill, `tokens` is prompt tokens in a chunk and `context` the mean prompt length.
    If only some of the model's `layers` are in it, `mean_residents` are their resident experts; else
    both are empty. Tasks take longer by the `stretch`, where together they want more than there is.
    """

    costs: Costs
    policy: Policy
    pipeline: Pipeline
    tokens: float
    context: float
    requests_per_chunk: float = 0.0
    layers: tuple[int, ...] = ()
    mean_residents: tuple[float, ...] = ()
    stretch: Stretch = ALONE

    @property
    def resident_experts(self) -> tuple[float, ...]:
        """Experts that stay on the GPU, for each layer of the work."""
        return self.mean_residents or self.policy.resident_experts

    def kind(self, layer: int) -> Layer:
        """The kind of a layer of the work."""
        return self.costs.spec.layer_kind(self.layers[layer] if self.layers else layer)

    def num_bytes(self, task: TaskId) -> int:
        """Bytes that the task moves; 0 if it computes."""
        return _moved_bytes(task.act, self._load(task.layer))

    def _load(self, layer: int) -> Load:
        """What tasks of a layer have to do."""
        resident, kind = self.resident_experts[layer], self.kind(layer)
        parts = self.pipeline.parts_of(layer)
        elsewhere = parts or self.policy.ffn_in(self.pipeline.phase) is Device.CPU
        others = max(0.0, kind.num_experts - resident)
        return Load(
            costs=self.costs,
            kind=kind,
            tokens=self.tokens,
            context=self.context,
            known={},
            is_last=layer == self.pipeline.num_layers - 1,
            requests=self.requests_per_chunk,
            gpu_experts=resident if elsewhere else self.costs.spec.num_experts,
            host_experts=others,
            part_experts=others / max(parts, 1),
            page_bytes=self._streamed_bytes(layer) / self.pipeline.num_pages,
        )

    def _streamed_bytes(self, layer: int) -> float:
        """Weight bytes of a layer that are loaded whole in this phase."""
        placement = self.policy.placement(self.costs.spec, self.pipeline.phase)
        return float(placement.bytes_at(Place.STREAMED, ((self.kind(layer), 1),), self.resident_experts[layer]))

    def seconds_of(self) -> Callable[[TaskId], float]:
        """A function from task to seconds, among others; tasks alike are worked out once."""
        alone_of = self.alone()
        return lambda task: self.stretch.seconds(task.act, *alone_of(task))

    def alone(self) -> Callable[[TaskId], TaskSeconds]:
        """A function from task to what it takes without others."""
        forms: dict[tuple[Layer, float, bool], tuple[Load, dict[Act, TaskSeconds]]] = {}
        last = self.pipeline.num_layers - 1
        known: list[tuple[Load, dict[Act, TaskSeconds]]] = []
        for layer, resident in enumerate(self.resident_experts):
            form = self.kind(layer), resident, layer == last
            if form not in forms:
                forms[form] = self._load(layer), {}
            known.append(forms[form])
        alike: dict[tuple[Act, Layer, bool, float, int], TaskSeconds] = {}

        def of_task(act: Act, load: Load, num_bytes: int) -> TaskSeconds:
            accessed = self.costs.accessed_bytes(act, load, num_bytes)
            return TaskSeconds(float(act.seconds(load, num_bytes)), float(self.costs.host_memory(accessed)))

        def of_kind(act: Act, load: Load, num_bytes: int) -> TaskSeconds:
            if act.by_residents:
                return of_task(act, load, num_bytes)
            same = act, load.kind, load.is_last, float(load.gpu_experts), num_bytes
            if same not in alike:
                alike[same] = of_task(act, load, num_bytes)
            return alike[same]

        def seconds(task: TaskId) -> TaskSeconds:
            load, of_layer = known[task.layer]
            act = task.act
            if act not in of_layer:
                of_layer[act] = of_kind(act, load, _moved_bytes(act, load))
            return of_layer[act]

        return seconds


def _moved_bytes(act: Act, load: Load) -> int:
    return round(float(act.moves(load)))
