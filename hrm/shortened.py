"""Long graphs over fewer layers, from whose time that of all of them follows."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from math import ceil
from typing import Final, NamedTuple

from hrm.costs import LayerMix, TaskWork

_LONGEST_PERIOD: Final = 8  # of layers whose kinds take turns
LEAST_LAYERS: Final = 4  # that are simulated, in two turns at least, however many tasks each has
_NOTHING: Final = 1e-9

# What a layer of the shortened work stands for: layers of the whole one, with shares that add up to one.
_StandIn = tuple[tuple[int, float], ...]


class _Pattern(NamedTuple):
    """How layers follow one another: some at the head, then a period of some that `repeats`, and the rest."""

    head: int
    period: int
    repeats: int
    rest: int

    @staticmethod
    @lru_cache
    def of(order: tuple[int, ...]) -> "_Pattern":
        """The pattern of layers of such kinds that has the fewest layers that are not repeats of others.

        If most layers are none, they are taken to be all alike.
        """
        found: list[_Pattern] = []
        for period in range(1, min(_LONGEST_PERIOD, len(order)) + 1):
            head = max((i + 1 for i in range(len(order) - period) if order[i] != order[i + period]), default=0)
            repeats, rest = divmod(len(order) - head, period)
            if 2 * (head + period + rest) <= len(order):
                found.append(_Pattern(head, period, repeats, rest))
        alike = _Pattern(0, 1, len(order), 0)
        return min(found, key=lambda pattern: len(order) - pattern.period * (pattern.repeats - 1), default=alike)

    def least_repeats(self) -> int:
        """How many repeats stand for all of them at least."""
        return max(2, LEAST_LAYERS // self.period)

    def over(self, repeats: int) -> "list[_StandIn]":
        """What each layer stands for where there are only so many repeats: equally many of all."""
        span, first_of_rest = self.repeats / repeats, self.head + self.period * self.repeats

        def stand_in(repeat: int, place: int) -> _StandIn:
            """The layers in one place of a period, over a span of repeats that need not be whole."""
            first, last = repeat * span, (repeat + 1) * span
            layers = range(self.head + place, first_of_rest, self.period)
            whole = range(int(first), ceil(last - _NOTHING))
            return tuple((layers[i], (min(i + 1, last) - max(i, first)) / span) for i in whole)

        return [
            *(((i, 1.0),) for i in range(self.head)),
            *(stand_in(repeat, place) for repeat in range(repeats) for place in range(self.period)),
            *(((first_of_rest + i, 1.0),) for i in range(self.rest)),
        ]


def shortened(work: TaskWork, most_layers: int) -> list[tuple[float, TaskWork]]:
    """Works over about so many layers at most, with factors: by these, their times add up to that of the whole work.

    What more a longer form takes than a shorter one, every further layer takes as well. Where layers are of kinds that
    take turns, whole turns are left out: their lanes wait for one another, as those of layers that are all of a mean
    do not.
    """
    pattern = _Pattern.of(work.costs.spec.order)
    many = max(pattern.least_repeats(), (most_layers - pattern.head - pattern.rest) // pattern.period)
    if pattern.repeats <= many:
        return [(1.0, work)]
    few = many // 2
    beyond = (pattern.repeats - many) / (many - few)
    return [(1 + beyond, _cut(work, pattern.over(many))), (-beyond, _cut(work, pattern.over(few)))]


def _cut(work: TaskWork, stand_ins: Sequence[_StandIn]) -> TaskWork:
    """The work over layers each of which stands for some of it."""
    pipeline, kinds = work.pipeline, work.costs.spec.layers

    def shares(of_each: Sequence[float]) -> tuple[float, ...]:
        """Of what the layers have, if they are told: what each stand-in has of it on average."""
        return tuple(sum(part * of_each[layer] for layer, part in stand_in) for stand_in in stand_ins if of_each)

    def are_any(of_each: Sequence[bool]) -> tuple[bool, ...]:
        return tuple(share > _NOTHING for share in shares(of_each))

    def mix(stand_in: _StandIn) -> LayerMix:
        parts = dict.fromkeys((kinds[layer] for layer, _ in stand_in), 0.0)
        for layer, part in stand_in:
            parts[kinds[layer]] += part
        return tuple(parts.items())

    return replace(
        work,
        mean_residents=shares(work.resident_experts),
        layer_mixes=tuple(map(mix, stand_ins)) if len(work.costs.spec.layer_kinds()) > 1 else (),
        pipeline=replace(
            pipeline,
            num_layers=len(stand_ins),
            streamed=are_any(pipeline.streamed),
            cpu_experts=are_any(pipeline.cpu_experts),
            parts=tuple(ceil(share - _NOTHING) for share in shares(pipeline.parts)),
            states=are_any(pipeline.states),
            attention_weights=are_any(pipeline.attention_weights),
        ),
    )
