"""A policy: what is batched together, where work is done and what stays on the GPU.

One principle says where work runs: data that lies on the GPU is used on the GPU, and `attention`
and `ffn` say where the data that stays on the host is used. The numbers are integers that are
executed as they stand; the paper's six numbers are derived from them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import accumulate, pairwise
from math import ceil
from typing import Final, NamedTuple

from hrm.contract.rows import KV_BLOCK_TOKENS
from hrm.errors import PolicyError
from hrm.formats import FORMATS, SCALED_KV_FORMATS, Formats
from hrm.layers import ExpertDivision
from hrm.model_spec import ModelSpec
from hrm.numeric import N
from hrm.placement import Place, Placement, caches_at
from hrm.schedule_name import ScheduleName
from hrm.tasks import Device, Phase

PAPER_SYMBOLS: Final = "(N, μ, A_g, F_g, r_w, r_c)"


class PaperTuple(NamedTuple):
    """A policy in the symbols of MoE-Lightning, arXiv 2411.11217, §4.2."""

    N: int
    mu: int
    A_g: int
    F_g: int
    r_w: float
    r_c: float

    def __str__(self) -> str:
        """The six numbers as they are printed, in the order of `PAPER_SYMBOLS`."""
        return f"({self.N}, {self.mu}, {self.A_g}, {self.F_g}, {self.r_w:.3f}, {self.r_c:.3f})"


class Parallelism(StrEnum):
    """How several GPUs of one machine divide the work; the same for a single one."""

    TENSOR = "tensor"
    PIPELINE = "pipeline"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How a batch is run; complete, nothing left to decide.

    `resident_experts[i]` experts of layer i live on the GPU (the first ones), and with
    `resident_dense` so do all projections, norms and routers; the LM head always does and the
    token embedding never. The KV cache of `gpu_kv_micro_batches` micro-batches lives on the GPU.
    Each micro-batch's cache holds `kv_tokens_per_micro_batch` tokens, and prompts are prefilled in
    chunks of at most `prefill_chunk_tokens`. A longer prompt is split over chunks, and its keys and
    values stay on the GPU until its last part: in its cache if that is there, else in the buffers
    through which attention on the GPU streams the cache, else in one of `prefix_buffer_tokens`. In
    that one it stays in any case where a layer's cache is not what attention over earlier parts needs.
    Where `ffn` is the CPU, `prefill_ffn` says whether the experts that are not resident are computed
    there in prefill too, or move to the GPU for it.
    Experts that stream move with the rest of their layer, or with `experts_per_part` so many at a time: of a layer
    there are then only two such parts on the GPU, and every micro-batch or chunk loads all of them again. With
    `staging`, weights go through pinned buffers. Orders that move a layer's weights in pages make one for each
    micro-batch, or `weight_pages`. `dtype` is computed in; `weight_format` and `kv_format` are it too by default.
    In tensor parallelism each GPU has a part of every expert, or whole ones, as many as any other: `expert_division`
    says which. Experts are counted as one GPU has them.
    In pipeline parallelism the policy is that of one stage: its layers, and one of the batches that
    are under way. With `stage_lengths` it is that of all stages, which have so many layers each, and
    `resident_experts` are those of the whole model. `gpus` are the numbers of those that are used,
    where others would only hold these up, or the model cannot be divided by more; without it, all are.
    """

    schedule: ScheduleName = ScheduleName.CGOPIPE
    batch_size: int
    micro_batch_size: int
    attention: Device = Device.CPU
    ffn: Device = Device.GPU
    prefill_ffn: Device = Device.GPU
    resident_experts: tuple[int, ...]
    resident_dense: bool = True
    gpu_kv_micro_batches: int = 0
    kv_tokens_per_micro_batch: int
    prefill_chunk_tokens: int
    prefix_buffer_tokens: int = 0
    experts_per_part: int = 0
    staging: bool = False
    weight_pages: int | None = None
    parallelism: Parallelism = Parallelism.TENSOR
    expert_division: ExpertDivision = ExpertDivision.INNER
    stage_lengths: tuple[int, ...] = ()
    gpus: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    weight_format: str = ""
    kv_format: str = ""

    def __post_init__(self) -> None:
        """Complete the formats; reject numbers that contradict one another (PolicyError)."""
        for name in ("weight_format", "kv_format"):
            object.__setattr__(self, name, getattr(self, name) or self.dtype)
        for field, holds, rule in self._rules():
            if not holds:
                value = getattr(self, field)
                shown = str(value) if isinstance(value, StrEnum) else value
                remedy = "correct it or run hrm search"
                raise PolicyError(f"policy: {field}", shown, f"must {rule}", remedy, field=field)

    def _rules(self) -> tuple[tuple[str, bool, str], ...]:
        """What must hold of each field, and in words."""
        kv_tokens, parts, lengths = self.kv_tokens_per_micro_batch, self.experts_per_part, self.stage_lengths
        kv_formats = (*FORMATS, *SCALED_KV_FORMATS)
        streams_all = self.prefill_ffn is Device.GPU and not self.staging
        are_stages = self.parallelism is Parallelism.PIPELINE and min(lengths, default=0) >= 1
        least = self.micro_batch_size
        return (
            ("micro_batch_size", self.micro_batch_size >= 1, "be at least 1"),
            ("batch_size", self.batch_size >= least, f"be at least micro_batch_size {least}"),
            ("prefill_ffn", self.ffn is Device.CPU or self.prefill_ffn is Device.GPU, "be gpu where ffn is gpu"),
            (
                "experts_per_part",
                parts == 0 or (parts > 0 and streams_all),
                "be at least 0, and 0 with staging or where the CPU computes experts in prefill too",
            ),
            (
                "gpu_kv_micro_batches",
                0 <= self.gpu_kv_micro_batches <= self.num_micro_batches,
                f"lie between 0 and num_micro_batches {self.num_micro_batches}",
            ),
            (
                "kv_tokens_per_micro_batch",
                kv_tokens >= KV_BLOCK_TOKENS and kv_tokens % KV_BLOCK_TOKENS == 0,
                f"be a positive multiple of the KV block of {KV_BLOCK_TOKENS} tokens",
            ),
            ("prefill_chunk_tokens", self.prefill_chunk_tokens >= 1, "be at least 1"),
            ("prefix_buffer_tokens", self.prefix_buffer_tokens >= 0, "be at least 0"),
            (
                "weight_pages",
                self.weight_pages is None or self.weight_pages >= 1,
                "be at least 1, or null for one page for each micro-batch",
            ),
            ("dtype", self.dtype in FORMATS, f"be one of {', '.join(FORMATS)}"),
            ("weight_format", self.weight_format in FORMATS, f"be one of {', '.join(FORMATS)}"),
            ("kv_format", self.kv_format in kv_formats, f"be one of {', '.join(kv_formats)}"),
            (
                "resident_experts",
                min(self.resident_experts, default=-1) >= 0,
                "hold a count of at least 0 for every layer",
            ),
            (
                "expert_division",
                self.expert_division is ExpertDivision.INNER or self.parallelism is Parallelism.TENSOR,
                "be inner in a pipeline, where every stage has all experts",
            ),
            (
                "stage_lengths",
                not lengths or (are_stages and sum(lengths) == len(self.resident_experts)),
                "be those of a pipeline, at least 1 each, and as many layers together as resident_experts has",
            ),
        )

    @property
    def stages(self) -> tuple[range, ...]:
        """The layers of each stage; none where the policy is that of one part of the model."""
        ends = list(accumulate(self.stage_lengths, initial=0))
        return tuple(range(low, high) for low, high in pairwise(ends))

    def of_stage(self, index: int) -> "Policy":
        """The policy of one of the stages, for its own layers."""
        layers = self.stages[index]
        return replace(
            self, stage_lengths=(), gpus=(), resident_experts=self.resident_experts[layers.start : layers.stop]
        )

    def check_model(self, spec: ModelSpec) -> None:
        """Raise PolicyError if the policy was made for a model of other dimensions."""
        if len(self.resident_experts) != spec.num_layers:
            raise PolicyError(
                "policy: resident_experts",
                self.resident_experts,
                f"must have one count for each of the {spec.num_layers} layers of {spec.name}",
                "run hrm search for this model",
            )
        for layer, count in enumerate(self.resident_experts):
            there_are = spec.layer_kind(layer).num_experts
            if count > there_are:
                raise PolicyError(
                    f"policy: resident_experts[{layer}]",
                    count,
                    f"must be at most the {there_are} experts of {spec.name}",
                    "run hrm search for this model",
                )
        if self.experts_per_part > spec.num_experts:
            raise PolicyError(
                "policy: experts_per_part",
                self.experts_per_part,
                f"must be at most the {spec.num_experts} experts of {spec.name}",
                "correct it or run hrm search for this model",
                field="experts_per_part",
            )

    def for_batch(self, batch_size: int) -> "Policy":
        """The policy of a batch of so many requests, in the memory that is allotted for a whole one.

        Requests are spread evenly over as few micro-batches as they need. Caches on the GPU are used
        before any on the host, so that their number stays and not their share; and weights move in the
        pages of the whole batch, as that is what buffers for pages are made for.
        """
        if batch_size >= self.batch_size:
            return self
        micro_batch_size = min(self.micro_batch_size, batch_size)
        return replace(
            self,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            gpu_kv_micro_batches=min(self.gpu_kv_micro_batches, -(-batch_size // micro_batch_size)),
            weight_pages=self.num_weight_pages,
        )

    @property
    def formats(self) -> Formats:
        """How weights and KV cache are stored, and what is computed in."""
        return Formats.named(self.dtype, weights=self.weight_format, kv_cache=self.kv_format)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches in a batch; the last may be smaller."""
        return -(-self.batch_size // max(self.micro_batch_size, 1))

    @property
    def num_weight_pages(self) -> int:
        """Pages that a layer's weights move in, in an order that makes pages of them."""
        return self.num_micro_batches if self.weight_pages is None else self.weight_pages

    def parts(self, spec: ModelSpec, phase: Phase) -> tuple[int, ...]:
        """In how many parts the experts of each layer stream in a phase; 0 where none do so."""
        if not self.experts_per_part or self.ffn_in(phase) is Device.CPU:
            return (0,) * spec.num_layers
        return tuple(
            -(-(layer.num_experts - count) // self.experts_per_part)
            for layer, count in zip(spec.layers, self.resident_experts, strict=True)
        )

    def part_bytes(self, spec: ModelSpec) -> int:
        """Bytes of the largest part that experts stream in; 0 if they do not."""
        any_parts = any(self.parts(spec, Phase.PREFILL))  # prefill streams all that decode does
        return any_parts * self.experts_per_part * spec.expert_bytes(self.formats.weights)

    @property
    def other_kv_format(self) -> str:
        """The format of the KV cache where that is not in the dtype; else empty."""
        return "" if self.kv_format == self.dtype else self.kv_format

    @property
    def streams_kv(self) -> bool:
        """Whether attention on the GPU reads a part of the KV cache over the link."""
        return self.kv_caches_at(Place.STREAMED) > 0

    def max_prompt_tokens(self, spec: ModelSpec) -> int:
        """Tokens of the longest prompt that can be prefilled, however many chunks it takes."""
        without_place = self.kv_caches_at(Place.HOST) > 0 or not serves_as_prefix(spec, self.formats)
        split = self.prefix_buffer_tokens if without_place else self.kv_tokens_per_micro_batch
        return max(self.prefill_chunk_tokens, split)

    def kv_on_gpu(self, micro_batch: int) -> bool:
        """Whether that micro-batch's KV cache lives on the GPU; they are spread evenly."""
        count, total = self.gpu_kv_micro_batches, self.num_micro_batches
        return (micro_batch + 1) * count // total > micro_batch * count // total

    def kv_caches_at(self, place: Place) -> int:
        """How many micro-batches have their KV cache at a place."""
        on_gpu, gpu_attention = self.gpu_kv_micro_batches, int(self.attention is Device.GPU)
        return int(caches_at(place, number=self.num_micro_batches, on_gpu=on_gpu, gpu_attention=gpu_attention))

    def ffn_in(self, phase: Phase) -> Device:
        """Where the experts that are not resident are computed in a phase."""
        return self.prefill_ffn if phase is Phase.PREFILL else self.ffn

    def placement(self, spec: ModelSpec, phase: Phase) -> Placement:
        """Where the weights of its layers are in a phase."""
        return Placement(
            spec=spec,
            weights=self.formats.weights,
            resident_dense=int(self.resident_dense),
            cpu_experts=int(self.ffn_in(phase) is Device.CPU),
            in_parts=int(self.experts_per_part > 0),
        )

    def streamed(self, spec: ModelSpec, phase: Phase) -> tuple[bool, ...]:
        """Of each layer, whether weights are loaded whole before it runs."""
        streams = [False] * spec.num_layers
        for alike in self.layers_by_form(spec):
            if self.streamed_bytes(spec, alike[0], phase) > 0:
                for layer in alike:
                    streams[layer] = True
        return tuple(streams)

    def layers_by_form(self, spec: ModelSpec) -> list[list[int]]:
        """The layers, those together that are of one kind and have as many resident experts."""
        forms: dict[tuple[int, int], list[int]] = {}
        for layer, form in enumerate(zip(spec.order, self.resident_experts, strict=True)):
            forms.setdefault(form, []).append(layer)
        return list(forms.values())

    def streamed_bytes(self, spec: ModelSpec, layer: int, phase: Phase) -> int:
        """Weight bytes of a layer that are loaded whole before it runs."""
        one = ((spec.layer_kind(layer), 1),)
        return int(self.placement(spec, phase).bytes_at(Place.STREAMED, one, self.resident_experts[layer]))

    def host_bytes(self, spec: ModelSpec, layer: int) -> int:
        """Weight bytes of a layer that lie on the host: all that do not stay on the GPU."""
        one, placement = ((spec.layer_kind(layer), 1),), self.placement(spec, Phase.DECODE)
        places = (Place.STREAMED, Place.IN_PARTS, Place.HOST)
        return int(sum(placement.bytes_at(place, one, self.resident_experts[layer]) for place in places))

    def weight_share_on_gpu(self, spec: ModelSpec) -> float:
        """The paper's r_w: share of the layers' weight bytes that lives on the GPU.

        `spec` is that of the part that the policy is for: of a stage in pipeline parallel.
        """
        assert len(self.resident_experts) == spec.num_layers, "a policy is told of its own part"
        held = self.placement(spec, Phase.DECODE).bytes_in_all(Place.GPU, sum(self.resident_experts))
        total = spec.total_layer_bytes(self.formats.weights)
        return float(1 - (total - held) / total)

    @property
    def kv_share_on_gpu(self) -> float:
        """The paper's r_c: share of the KV cache that lives on the GPU."""
        return self.gpu_kv_micro_batches / self.num_micro_batches

    def paper_tuple(self, spec: ModelSpec) -> PaperTuple:
        """The policy in the paper's six numbers."""
        return PaperTuple(
            self.batch_size,
            self.micro_batch_size,
            int(self.attention is Device.GPU),
            int(self.ffn is Device.GPU),
            self.weight_share_on_gpu(spec),
            self.kv_share_on_gpu,
        )


def spread_experts(spec: ModelSpec, total: int) -> tuple[int, ...]:
    """`total` resident experts over the layers that have experts, as evenly as integers allow."""
    counts = _evenly(total, spec.num_expert_layers)
    return tuple(next(counts) if layer.has_experts else 0 for layer in spec.layers)


def in_whole_layers(spec: ModelSpec, total: int) -> tuple[int, ...]:
    """`total` resident experts as all of some layers, evenly among those that have experts, and one with the rest.

    The last layer, which has the least to do in prefill, has none as long as another has room.
    """
    whole, rest = divmod(total, spec.num_experts)
    counts = [spec.num_experts * count for count in _evenly(whole, spec.num_expert_layers)][::-1]
    if rest:
        counts[counts.index(0)] = rest
    of_layer = iter(counts)
    return tuple(next(of_layer) if layer.has_experts else 0 for layer in spec.layers)


def _evenly(total: int, parts: int) -> Iterator[int]:
    """`total` in so many parts, as evenly as integers allow."""
    return ((i + 1) * total // parts - i * total // parts for i in range(parts))


def kv_tokens_for(micro_batch_size: N, mean_context_len: float, max_context_len: int) -> N:
    """KV cache tokens that a micro-batch needs, in whole blocks.

    Room for one request of the greatest length and `micro_batch_size` - 1 of mean length, each with half a block lost
    to rounding, or a whole one if all are about as long. The greatest is beyond the mean by as much as balancing may
    leave between micro-batches, so that no few are left over for a batch of their own, which takes as many steps.
    """
    longest = _in_blocks(max_context_len)
    nearly_equal = longest - mean_context_len < KV_BLOCK_TOKENS
    each = longest if nearly_equal else ceil(mean_context_len + KV_BLOCK_TOKENS / 2)
    return _in_blocks(longest + (micro_batch_size - 1) * each)


def _in_blocks(tokens: N) -> N:
    return -(-tokens // KV_BLOCK_TOKENS) * KV_BLOCK_TOKENS


def prefix_tokens_for(
    spec: ModelSpec, formats: Formats, max_prompt_len: int, chunk_tokens: N, *, cpu_attention: N
) -> N:
    """Tokens that `prefix_buffer_tokens` needs: the longest prompt's if that is split, else 0.

    `cpu_attention` is 1 where caches lie on the host and are attended over there: otherwise a
    prompt under way has a place on the GPU. Not so where the cache is no place for what attention
    needs of earlier parts, as with latent attention or a quantised cache.
    """
    needed = cpu_attention if serves_as_prefix(spec, formats) else 1
    return max_prompt_len * needed * (chunk_tokens < max_prompt_len)


def serves_as_prefix(spec: ModelSpec, formats: Formats) -> bool:
    """Whether the cache of every layer is also what a split prompt keeps of its earlier parts."""
    return all(kind.mixer.keeps_prefix_in_cache(formats) for kind in spec.layer_kinds())
