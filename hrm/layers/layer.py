"""A layer: a mixer and the feed-forward blocks after it."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

from hrm.errors import ModelError
from hrm.formats import Formats
from hrm.layers.base import Block, FeedForward, Mixer, TensorSpec
from hrm.layers.feed_forward import RoutedExperts
from hrm.layers.work import Operator
from hrm.numeric import Number


@final
@dataclass(frozen=True, kw_only=True)
class Layer:
    """What tells one layer's cost from another's: layers are of one kind if they are equal."""

    mixer: Mixer
    ffn: tuple[FeedForward, ...]

    def __post_init__(self) -> None:
        """Reject blocks that do not go together (ModelError)."""
        widths = {block.hidden_size for block in self.blocks}
        if len(widths) > 1:
            raise ModelError(
                "hidden_size", sorted(widths), "must be the same in all blocks of a layer", "check the config"
            )

    @cached_property
    def _hash(self) -> int:
        return hash((self.mixer, self.ffn))

    def __hash__(self) -> int:
        """Worked out once: layers are keys of every table of costs."""
        return self._hash

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks, in the order in which they are computed."""
        return (self.mixer, *self.ffn)

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """All tensors, in the order in which they lie in memory."""
        return tuple(tensor for block in self.blocks for tensor in block.tensors)

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

    @cached_property
    def dense_parameters(self) -> int:
        """Parameters outside routed experts."""
        return sum(block.dense_parameters for block in self.blocks)

    @cached_property
    def parameters(self) -> int:
        """All parameters."""
        return self.dense_parameters + sum(block.num_experts * block.expert_parameters for block in self.experts)

    @cached_property
    def active_parameters(self) -> int:
        """Parameters that one token touches, on average if some experts compute nothing."""
        routed = sum(block.computed_per_token * block.expert_parameters for block in self.experts)
        return self.dense_parameters + round(routed)

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

    def after_attention(self, formats: Formats, tokens: Number, num_experts: Number) -> Operator:
        """The rest of the layer: output projection, norms, routers, dense FFNs, and so many experts."""
        dense = sum((block.dense(formats, tokens) for block in self.ffn), self.mixer.finish(formats, tokens))
        if not self.experts:
            return dense
        assert len(self.experts) == 1, "plans know experts of one class"
        return dense + self.experts[0].run(formats, tokens, num_experts)
