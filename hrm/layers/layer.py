"""A layer: a mixer and the feed-forward blocks after it."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from math import lcm
from typing import Any, final

from hrm.contract.dequantising import bytes_moved, launches
from hrm.errors import ModelError
from hrm.formats import Format, Formats, PackedFormat, packed_format
from hrm.layers.base import Block, FeedForward, HashedOnce, Mixer, TensorSpec, Unit, places
from hrm.layers.feed_forward import ExpertDivision, RoutedExperts
from hrm.layers.work import Operator
from hrm.numeric import Number


@final
@dataclass(frozen=True, kw_only=True)
class Layer(HashedOnce):
    """What tells one layer's cost from another's: layers are of one kind if they are equal.

    `packed` are the names of tensors that are packed, each with its format.
    """

    mixer: Mixer
    ffn: tuple[FeedForward, ...]
    packed: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        """Reject blocks that do not go together (ModelError)."""
        widths = {block.hidden_size for block in self.blocks}
        if len(widths) > 1:
            raise ModelError(
                "hidden_size", sorted(widths), "must be the same in all blocks of a layer", "check the config"
            )
        tensors = {tensor.name: tensor for block in self.blocks for tensor in block.tensors}
        for name, form in self.packed:
            made, tensor = packed_format(form), tensors.get(name)
            if tensor is None or made is None or not made.takes(tensor.shape, tensor.parts):
                rule = "must be a format of packed weights in which a matrix's rows, and what it joins, are whole"
                raise ModelError(f"packed: {name}", form, rule, "check the config")

    __hash__ = HashedOnce.__hash__

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks, in the order in which they are computed."""
        return (self.mixer, *self.ffn)

    @cached_property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """All tensors, in the order in which they lie in memory."""
        return tuple(tensor for block in self.blocks for tensor in self.tensors_of(block))

    def tensors_of(self, block: Block) -> tuple[TensorSpec, ...]:
        """The tensors of one of its blocks, each in its format."""
        return tuple(tensor._replace(packed=self._formats.get(tensor.name)) for tensor in block.tensors)

    @cached_property
    def _formats(self) -> dict[str, PackedFormat | None]:
        return {name: packed_format(form) for name, form in self.packed}

    @property
    def hidden_size(self) -> int:
        """Elements of a token's hidden state."""
        return self.mixer.hidden_size

    @cached_property
    def experts(self) -> tuple[RoutedExperts, ...]:
        """The blocks with routed experts: mostly none or one, several if there are several classes."""
        return tuple(block for block in self.ffn if isinstance(block, RoutedExperts))

    @property
    def has_experts(self) -> bool:
        """Whether there are routed experts."""
        return bool(self.experts)

    @cached_property
    def num_experts(self) -> int:
        """Routed experts of all classes."""
        return sum(block.num_experts for block in self.experts)

    def experts_of(self, rank: int) -> range:
        """Which of all routed experts one of several GPUs has, of a layer that is what it has; see `RoutedExperts`."""
        return self.experts[0].experts_of(rank) if self.experts else range(0)

    @cached_property
    def dense_parameters(self) -> int:
        """Parameters outside routed experts."""
        return sum(block.dense_parameters for block in self.blocks)

    @cached_property
    def parameters(self) -> int:
        """All parameters."""
        return self.dense_parameters + sum(block.num_experts * block.expert_parameters for block in self.experts)

    def dense_bytes(self, plain: Format) -> int:
        """Bytes outside routed experts; `plain` is the format of what is not packed."""
        return self._unit_bytes(plain)[0]

    def expert_bytes(self, plain: Format) -> int:
        """Bytes of one routed expert, 0 if there is none."""
        return self._unit_bytes(plain)[1]

    def bytes_in(self, plain: Format) -> int:
        """Bytes of all weights."""
        return self.dense_bytes(plain) + self.num_experts * self.expert_bytes(plain)

    def _unit_bytes(self, plain: Format) -> tuple[int, int]:
        found = self._bytes.get(plain)
        if found is None:
            dense, expert = (
                [tensor for tensor in self.tensors if (tensor.unit is Unit.EXPERT) == routed]
                for routed in (False, True)
            )
            found = self._bytes[plain] = places(dense, plain)[1], places(expert, plain)[1]
        return found

    @cached_property
    def _bytes(self) -> dict[Format, tuple[int, int]]:
        return {}

    def formats_of(self, block: Block, formats: Formats, *, routed: bool = False) -> Formats:
        """The same with the mean of a weight in a block: of its routed experts, or of all else."""
        if not self.packed:
            return formats
        asked = block, formats, routed
        if asked not in self._means:
            self._means[asked] = replace(formats, weights=self._mean_of(block, formats, routed=routed))
        return self._means[asked]

    @cached_property
    def _means(self) -> dict[tuple[Block, Formats, bool], Formats]:
        return {}

    def _mean_of(self, block: Block, formats: Formats, *, routed: bool) -> Format:
        tensors = [tensor for tensor in self.tensors_of(block) if (tensor.unit is Unit.EXPERT) == routed]
        packed = [(tensor.packed, tensor.parameters) for tensor in tensors if tensor.packed is not None]
        sums = (
            sum(tensor.bytes_in(formats.weights) for tensor in tensors),
            sum(bytes_moved(form) * parameters for form, parameters in packed),
            sum(launches(form, parameters) for form, parameters in packed),
        )
        total = sum(tensor.parameters for tensor in tensors)
        of_codes: Counter[str] = Counter()
        for form, parameters in packed:
            of_codes[form.code] += parameters
        code = next((code for code, count in of_codes.items() if 2 * count > total), "")
        return Format("packed", sums[0] / total, code, sums[1] / total, sums[2] / total)

    def project(self, formats: Formats, tokens: Number) -> Operator:
        """Norm, projections and rotary embedding before attention."""
        return self.mixer.project(self.formats_of(self.mixer, formats), tokens)

    def prefill(self, formats: Formats, tokens: Number, prompt_len: Number) -> Operator:
        """All up to attention over a chunk of `tokens` in prompts of `prompt_len`."""
        return self.mixer.prefill(self.formats_of(self.mixer, formats), tokens, prompt_len)

    def run_experts(self, formats: Formats, tokens: Number, num_experts: Number) -> Operator:
        """So many of the routed experts over a micro-batch of tokens."""
        assert len(self.experts) == 1, "plans know experts of one class"
        block = self.experts[0]
        return block.run(self.formats_of(block, formats, routed=True), tokens, num_experts)

    @cached_property
    def active_parameters(self) -> int:
        """Parameters that one token touches, on average if some experts compute nothing."""
        routed = sum(block.computed_per_token * block.expert_parameters for block in self.experts)
        return self.dense_parameters + round(routed)

    def with_ffn(self, other: "Layer") -> "Layer":
        """The same with another layer's feed-forward blocks."""
        ours = {tensor.name for tensor in self.mixer.tensors}
        packed = [pair for pair in self.packed if pair[0] in ours]
        packed += [pair for pair in other.packed if pair[0] not in {tensor.name for tensor in other.mixer.tensors}]
        return Layer(mixer=self.mixer, ffn=other.ffn, packed=tuple(packed))

    def obstacle_to(self, ranks: int, division: ExpertDivision) -> str:
        """Why so many GPUs in tensor parallel cannot divide it like that; empty if they can."""
        if division is ExpertDivision.WHOLE:
            for block in self.experts:
                if block.num_experts % ranks:
                    return f"its {block.num_experts} experts cannot be divided by {ranks}"
        blocks = self._shared_out(ranks, division).blocks
        return next(filter(None, (block.obstacle_to(ranks) for block in blocks)), "")

    def _shared_out(self, ranks: int, division: ExpertDivision) -> "Layer":
        """The same with the experts that one rank has, if these are not divided."""
        if division is ExpertDivision.INNER:
            return self
        ffn = (
            block.with_experts_shared_out(ranks) if isinstance(block, RoutedExperts) else block for block in self.ffn
        )
        return replace(self, ffn=tuple(ffn))

    def of_rank(self, ranks: int, division: ExpertDivision = ExpertDivision.INNER) -> "Layer":
        """What one of so many GPUs in tensor parallel has of it.

        Of a matrix whose parts are then no whole groups of its packed format, it has plain numbers.
        """
        layer = self._shared_out(ranks, division)
        divided = (tensor for tensor in layer.tensors if tensor.split is not None or tensor.unit is not Unit.EXPERT)
        forms = [tensor.packed for tensor in divided if tensor.packed is not None]
        whole = lcm(*(form.rows for form in forms), *(form.columns or 1 for form in forms))
        mixer, *ffn = (block.of_rank(ranks, whole) for block in layer.blocks)
        pairs = [(block, tensor) for block in (mixer, *ffn) for tensor in block.tensors]
        kept = {tensor.name for block, tensor in pairs if _is_whole(self._formats.get(tensor.name), block, tensor)}
        packed = tuple(pair for pair in self.packed if pair[0] in kept)
        return replace(self, mixer=mixer, ffn=tuple(ffn), packed=packed)

    @property
    def window(self) -> int:
        """How many tokens attention reaches back at most, 0 for all."""
        return self.mixer.window

    def with_window(self, window: int) -> "Layer":
        """The same with attention over at most so many tokens, or all if 0."""
        mixer: Any = self.mixer
        return replace(self, mixer=replace(mixer, window=window)) if self.window != window else self

    @cached_property
    def without_window(self) -> "Layer":
        """The same with attention over all tokens: what costs the same but for attention."""
        return self.with_window(0)

    def with_frequencies(self, frequencies: tuple[float, ...]) -> "Layer":
        """The same where routed experts are chosen with these shares of tokens."""
        measured = (
            replace(block, frequencies=frequencies) if isinstance(block, RoutedExperts) else block for block in self.ffn
        )
        return replace(self, ffn=tuple(measured))

    def finish(self, formats: Formats, tokens: Number) -> Operator:
        """The output projection."""
        return self.mixer.finish(self.formats_of(self.mixer, formats), tokens)

    def feed_forward(self, formats: Formats, tokens: Number, num_experts: Number) -> Operator:
        """What comes after it: norms, routers, dense FFNs, and so many experts."""
        return self._then_feed_forward(Operator(), formats, tokens, num_experts)

    def after_attention(self, formats: Formats, tokens: Number, num_experts: Number) -> Operator:
        """The rest of the layer: both of these."""
        return self._then_feed_forward(self.finish(formats, tokens), formats, tokens, num_experts)

    def _then_feed_forward(self, before: Operator, formats: Formats, tokens: Number, num_experts: Number) -> Operator:
        for block in self.ffn:
            before += block.dense(self.formats_of(block, formats), tokens)
        return before + self.run_experts(formats, tokens, num_experts) if self.experts else before


def _is_whole(form: PackedFormat | None, block: Block, tensor: TensorSpec) -> bool:
    """Whether what a GPU has of a matrix begins and ends with groups of its format."""
    if form is None:
        return False
    if tensor.split == 1 and (form.ordered or tensor.shape[1] % (form.columns or 1)):
        return False
    whole = all(section.number * section.size % form.rows == 0 for section in block.sections_of(tensor))
    return whole and form.takes(tensor.shape, tensor.parts)
