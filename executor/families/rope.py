"""Rotary embeddings as configs ask for them: the base, the part of a head that turns, and its scaling.

The scalings are those of published checkpoints, with the numbers that transformers' `ROPE_INIT_FUNCTIONS`
give. Two of them turn otherwise once a text is longer than the model was first trained for, so that keys
which are cached by then would have to be rotated anew.

`longrope` has two sets of frequencies. A request that may grow longer than that, by its prompt and what it
may generate, has the second from its first token on, whatever else is in its batch. Transformers chooses
by how long the longest text of a batch is so far: for a prompt that is longer by itself it is the same.
(Only of Phi-3.5-MoE transformers 5 never takes the second set; we do, as its publisher's code does.)

`dynamic` has other frequencies for every length. Transformers leaves the keys that are cached as they were,
so what it generates depends on how a text came to its length, and on the batch: no request may be longer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from executor.model import Architecture, LayerMaths, Rotary
from executor.model.rotary import plain_frequencies
from hrm.model_spec import Keys, ModelSpec

if TYPE_CHECKING:
    from hrm.layers import Layer

SECTIONS: Final = ("rope_parameters", "rope_scaling", "attn_config")
OTHER_MODEL: Final = "use a model of a supported architecture"
SAME_KIND: Final = {"mrope": "default", "su": "longrope"}  # of text all axes of mrope are equal
BY_LENGTH: Final = ("dynamic", "longrope")
WHY_NO_LONGER: Final = ", as dynamic scaling would turn all keys otherwise with every further token"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """What a config says of rotary embeddings.

    `section` has the keys of the `kind` of scaling. `partial` is the part of a head that turns, or
    `elements` of it do if that is not 0; `told` are the keys that say so. `positions` are what the whole
    config allows for, `first_positions` those before scaling. `long` says that it is for texts with more
    than these.
    """

    section: Keys
    kind: str
    theta: float
    told: Keys
    partial: float
    elements: int
    positions: int
    first_positions: int
    long: bool = False

    @staticmethod
    def read(keys: Keys, *, theta: float, positions: int, partial: float | None = None, of: str = "") -> "Rope":
        """Read a config; `theta`, `positions` and `partial` are for what it does not say.

        Without `partial` whole heads turn, but for kinds of scaling that are of a part. With `of` the
        config says it for each kind of layer, of which that is one. Raises ModelError naming the
        key if the config contradicts itself or that, or has an unknown kind of scaling.
        """
        positions = keys.integer("max_position_embeddings", default=positions)
        sections = (keys.section(name) for name in ("rope_scaling", "rope_parameters") if keys.get(name))
        section = next(sections, Keys({}, keys.file, keys.path))
        section = section.section(of) if of else section
        name = "rope_type" if section.get("rope_type") is not None or section.get("type") is None else "type"
        kind = section.word(name, (*KINDS, *SAME_KIND), default="default")
        first = next((at for at in (keys, section) if at.get("original_max_position_embeddings") is not None), None)
        told = [at for at in (section, keys) if at.get("partial_rotary_factor") is not None]
        if partial is None and kind != "proportional" and told and told[0].get("partial_rotary_factor") != 1:
            raise told[0].refusal("partial_rotary_factor", "must be 1: whole heads are rotated", OTHER_MODEL)
        elements = 0 if told or partial is None else keys.integer("rotary_dim", default=0, at_least=0)
        base = rope_theta(section if of else keys, theta)
        if kind == "yarn" and base <= 1:
            raise keys.refusal("rope_theta", "must be greater than 1 for YaRN")
        return Rope(
            section=section,
            kind=SAME_KIND.get(kind, kind),
            theta=base,
            told=told[0] if told else keys,
            partial=told[0].number("partial_rotary_factor") if told else partial or 1.0,
            elements=elements,
            positions=positions,
            first_positions=first.integer("original_max_position_embeddings") if first else positions,
        )

    @property
    def max_positions(self) -> int:
        """Tokens that a text may have with these rotations."""
        return self.first_positions if self.kind in BY_LENGTH and not self.long else self.positions

    @property
    def of_long_texts(self) -> "Rope | None":
        """The rotations of texts with more than the first positions, where they have other ones that we run."""
        differs = self.kind == "longrope" and self.positions > self.first_positions
        return replace(self, long=True) if differs else None

    def architecture(
        self, spec: ModelSpec, maths: "Callable[[Layer, Rope], LayerMaths]", **others: Any
    ) -> Architecture:
        """The architecture with the maths of each layer, which follows from the layer and these rotations."""
        longer = self.of_long_texts
        return Architecture.of(
            spec,
            lambda layer: maths(layer, self),
            max_position_embeddings=(longer or self).max_positions,
            why_no_longer=WHY_NO_LONGER if self.kind == "dynamic" else "",
            first_positions=self.first_positions,
            long_layers=Architecture.of(spec, lambda layer: maths(layer, longer)).layers if longer else (),
            **others,
        )

    def rotary(self, head_dim: int, *, interleaved: bool = False) -> Rotary:
        """The rotation of heads so wide."""
        whole = self.kind == "proportional"  # as elements that turn by nothing count as well
        elements = self.elements or int(head_dim * (1 if whole else self.partial))
        if elements % 2 or not 0 < elements <= head_dim:
            key = "rotary_dim" if self.elements else "partial_rotary_factor"
            rule = f"must leave an even number of each head's {head_dim} elements to be rotated, not {elements}"
            raise self.told.refusal(key, rule, OTHER_MODEL)
        frequencies_h, magnitude = KINDS[self.kind](self, torch.tensor(plain_frequencies(elements, self.theta)))
        return Rotary(tuple(frequencies_h.tolist()), interleaved, magnitude)

    @property
    def factor(self) -> float:
        """How many times as many positions there are as before scaling."""
        if self.section.get("factor") is None:
            return self.positions / self.first_positions
        return self.section.number("factor")

    def require(self, holds: bool, key: str, rule: str) -> None:  # noqa: FBT001
        """Raise ModelError naming the key of the section unless the rule holds."""
        if not holds:
            raise self.section.refusal(key, rule)


Scaled = tuple[Tensor, float]  # frequencies and magnitude


def _default(_: Rope, frequencies_h: Tensor) -> Scaled:
    return frequencies_h, 1.0


def _linear(rope: Rope, frequencies_h: Tensor) -> Scaled:
    return frequencies_h / rope.section.number("factor"), 1.0


def _proportional(rope: Rope, frequencies_h: Tensor) -> Scaled:
    """Of the whole head's rotations only the quick ones turn."""
    factor = rope.section.number("factor", default=1.0)
    turning = int(rope.partial * 2 * len(frequencies_h) // 2)
    return torch.where(torch.arange(len(frequencies_h)) < turning, frequencies_h / factor, 0.0), 1.0


def _llama3(rope: Rope, frequencies_h: Tensor) -> Scaled:
    """Slow rotations are slowed down, quick ones stay, and between them it changes smoothly."""
    factor, slow, quick = (rope.section.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    rope.require(quick >= slow, "high_freq_factor", f"must be at least low_freq_factor, {slow}")
    turns_h = rope.first_positions * frequencies_h / (2 * math.pi)
    # Where both are the same, as in Llama-4-Scout, the one's end is the other's beginning.
    share_h = ((turns_h - slow) / (quick - slow)).clamp(0, 1) if quick > slow else (turns_h > slow).float()
    return (1 - share_h) * frequencies_h / factor + share_h * frequencies_h, 1.0


def _yarn(rope: Rope, frequencies_h: Tensor) -> Scaled:
    """YaRN (arXiv 2309.00071): the same between other bounds, and a magnitude."""
    section, elements = rope.section, 2 * len(frequencies_h)

    def element(key: str, default: float) -> float:
        """Where a rotation turns so often over the first positions, counted in pairs."""
        turns = section.number(key, default=default)
        return elements * math.log(rope.first_positions / turns / (2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = element("beta_fast", 32), element("beta_slow", 1)
    if section.truth("truncate", default=True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, elements - 1)
    high = high + 0.001 if low == high else high
    slowed_h = ((torch.arange(len(frequencies_h)) - low) / (high - low)).clamp(0, 1)
    factor = rope.factor
    scaled_h = frequencies_h / factor * slowed_h + frequencies_h * (1 - slowed_h)
    if section.get("attention_factor") is not None:
        return scaled_h, section.number("attention_factor")
    if section.get("mscale") and section.get("mscale_all_dim"):
        return scaled_h, yarn_magnitude(factor, section.number("mscale")) / yarn_magnitude(
            factor, section.number("mscale_all_dim")
        )
    return scaled_h, yarn_magnitude(factor)


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies queries and keys by where there are `factor` times as many positions."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(rope: Rope, frequencies_h: Tensor) -> Scaled:
    """LongRoPE (arXiv 2402.13753); Phi-3.5-MoE gives the magnitudes itself."""
    section, factor = rope.section, rope.factor
    texts = "long" if rope.long else "short"
    slower_h = torch.tensor(section.numbers(f"{texts}_factor"))
    rope.require(len(slower_h) == len(frequencies_h), f"{texts}_factor", f"must have {len(frequencies_h)} numbers")
    for key in (f"{texts}_mscale", "attention_factor"):
        if section.get(key) is not None:
            return frequencies_h / slower_h, section.number(key)
    if factor <= 1:
        return frequencies_h / slower_h, 1.0
    rope.require(rope.first_positions > 1, "original_max_position_embeddings", "must be greater than 1")
    return frequencies_h / slower_h, math.sqrt(1 + math.log(factor) / math.log(rope.first_positions))


KINDS: Final[dict[str, Callable[[Rope, Tensor], Scaled]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _default,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}


def rope_theta(keys: Keys, default: float) -> float:
    """The base of the rotary embedding: at the top, or in the sections that have had it.

    Raises ModelError if it is given twice and differs.
    """
    given: dict[str, float] = {}
    for section in (keys, *(keys.section(name) for name in SECTIONS if keys.get(name))):
        if section.get("rope_theta") is None:
            continue
        theta = section.number("rope_theta")
        first = next(iter(given.items()), None)
        if first is not None and first[1] != theta:
            raise section.refusal(
                "rope_theta",
                f"must be {first[1]} as {first[0]} is: readers of such a config differ in which they take",
                "remove the one that the model was not trained with",
            )
        given[f"{section.path}: rope_theta" if section.path else "rope_theta"] = theta
    return next(iter(given.values()), float(default))
