"""Long graphs over some of their layers, from whose time that of all of them follows."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil
from typing import Final

from hrm.costs import TaskWork

_LEAST_LAYERS: Final = 4  # that are simulated, however many tasks each has
_OF_UNLIKE: Final = 12  # times as many as were asked for, where residents are not even
_GAPS: Final = 2  # between those that are, where residents are not even; else one
_SEAM: Final = 4  # layers that should come after a gap as they would have come without it
_LONGEST_TURN: Final = 8  # of layers whose kinds take turns
_COMMON: Final = 1 / 8  # of all layers: so many that come one after the other in a way are to be seen
_SOME_MORE: Final = 3  # layers more at most, before more places are looked at
_NOTHING: Final = 1e-9

_Form = tuple[int, int]  # what tells layers apart: their kind, and their residents unless those are even
_InTurn = tuple[_Form, _Form | None, _Form | None, _Form | None]  # a layer, the one after it, the two before it


@dataclass(frozen=True, slots=True)
class Shortened:
    """A work over some of its layers, and for how many that are left out each of them stands."""

    work: TaskWork
    stands_for: tuple[float, ...] = ()

    def left_out_s(self, took_s: Callable[[int], float]) -> float:
        """How long those that are left out take, given how long each layer of the work took."""
        return sum(count * took_s(layer) for layer, count in enumerate(self.stands_for) if count)


def shortened(work: TaskWork, most_layers: float) -> Shortened:
    """The work over about so many of its layers, or over more where those would not show all that there are.

    Lanes wait for one another over a few layers only. So a layer that is left out takes as long as those like it that
    come after such layers as it does. If residents are even, layers of a kind are all of their mean.
    """
    spec, residents = work.costs.spec, work.resident_experts
    counts = [count for count, layer in zip(residents, spec.layers, strict=True) if layer.has_experts]
    is_even = max(counts) - min(counts) <= 1
    forms = tuple((kind, 0 if is_even else int(count)) for kind, count in zip(spec.order, residents, strict=True))
    most = int(most_layers if is_even else _OF_UNLIKE * most_layers)
    kept, stands_for = _chosen(forms, most, gaps=1 if is_even else _GAPS)
    if len(kept) == len(forms):
        return Shortened(work)
    alike = [[i for i, form in enumerate(forms) if form == forms[layer]] if is_even else [layer] for layer in kept]
    return Shortened(_cut(work, kept, alike), stands_for)


@lru_cache
def _chosen(forms: tuple[_Form, ...], most: int, *, gaps: int) -> tuple[list[int], tuple[float, ...]]:
    """The layers that are simulated, and for how many others each of them stands."""
    most = max(most, _LEAST_LAYERS)
    if most >= len(forms):
        return list(range(len(forms))), ()
    in_turn = _in_turn(forms)
    to_be_seen = _to_be_seen(in_turn[2:-1])  # but for the ends, which are kept
    tried = [_kept(forms, min(most + more, len(forms)), gaps=gaps) for more in range(_SOME_MORE)]
    kept = next((kept for kept in tried if to_be_seen <= _seen(forms, kept)), tried[0])
    for layers in sorted(to_be_seen - _seen(forms, kept), key=in_turn.index):
        places = [layer for layer, each in enumerate(in_turn) if each == layers]
        kept = sorted({*kept, *_around(places[len(places) // 2], len(forms))})
    return kept, _stands_for(forms, kept)


def _seen(forms: Sequence[_Form], kept: Sequence[int]) -> set[_InTurn]:
    """How those layers come one after the other whose times are asked for."""
    return set(_in_turn([forms[layer] for layer in kept])[1:-1])


def _to_be_seen(in_turn: Sequence[_InTurn]) -> set[_InTurn]:
    """How layers come one after the other, if that is common, or most common of one of which there are several."""
    counts = Counter(in_turn)
    of_form: dict[_Form, Counter[_InTurn]] = defaultdict(Counter)
    for layers, count in counts.items():
        of_form[layers[0]][layers] = count
    several = {each.most_common(1)[0][0] for each in of_form.values() if each.total() > 1}
    return several | {layers for layers, count in counts.items() if count >= len(in_turn) * _COMMON}


def _around(layer: int, num_layers: int) -> range:
    """A layer with those that tell how it comes among others."""
    return range(max(layer - 2, 0), min(layer + 2, num_layers))


def _kept(forms: Sequence[_Form], most: int, *, gaps: int) -> list[int]:
    """About so many of the layers, with gaps between them after which they go on as before."""
    kept: list[int] = []
    longest, between = (len(forms) - most) // gaps, most // (gaps + 1)
    at = 0
    for _ in range(gaps):
        kept += range(at, at := at + between)
        shortest = max(longest - _LONGEST_TURN, 0)
        at += max(range(shortest, longest + 1), key=lambda gap, at=at: (_go_on(forms, at, at + gap), gap))
    return [*kept, *range(at, len(forms))]


def _go_on(forms: Sequence[_Form], at: int, after: int) -> int:
    """How many layers after a gap are as those at its beginning, of those that should be."""
    pairs = zip(forms[at : at + _SEAM], forms[after:], strict=False)
    return next((same for same, (here, there) in enumerate(pairs) if here != there), _SEAM)


def _stands_for(forms: Sequence[_Form], kept: Sequence[int]) -> tuple[float, ...]:
    """For how many of the others each kept layer stands: those that it is most like."""
    times = [0.0] * len(kept)
    in_turn, of_kept = _in_turn(forms), _in_turn([forms[layer] for layer in kept])
    left_out = Counter(in_turn[layer] for layer in set(range(len(forms))) - set(kept))
    for layers, count in left_out.items():
        # The first layer waits for its weights, and the last one has less to do in prefill.
        unlike = {i: _unlike(of_kept[i], layers) for i in range(1, len(kept) - 1)}
        least = min(unlike.values())
        likest = [i for i, how in unlike.items() if how == least]
        for i in likest:
            times[i] += count / len(likest)
    return tuple(times)


def _in_turn(forms: Sequence[_Form]) -> list[_InTurn]:
    """Each layer with the two before it and the one after it, whose weights are loaded meanwhile."""
    around = (None, None, *forms, None)
    return list(zip(forms, around[3:], around[1:], around, strict=False))


def _unlike(these: _InTurn, those: _InTurn) -> tuple[bool, int, int]:
    """How unlike layers are: in their kind first, then in residents, then in how many of those around them."""
    (kind, residents), (other_kind, other_residents) = these[0], those[0]
    same = sum(one == other for one, other in zip(these, those, strict=True))
    return kind != other_kind, abs(residents - other_residents), -same


def _cut(work: TaskWork, kept: Sequence[int], alike: Sequence[Sequence[int]]) -> TaskWork:
    """The work over some of its layers, each of which has the mean of those alike."""
    pipeline = work.pipeline

    def means(of_each: Sequence[float]) -> tuple[float, ...]:
        """Of what the layers have, if they are told."""
        return tuple(sum(of_each[i] for i in layers) / len(layers) for layers in alike if of_each)

    def are_any(of_each: Sequence[bool]) -> tuple[bool, ...]:
        return tuple(mean > 0 for mean in means(of_each))

    return replace(
        work,
        layers=tuple(kept),
        mean_residents=means(work.resident_experts),
        pipeline=replace(
            pipeline,
            num_layers=len(kept),
            streamed=are_any(pipeline.streamed),
            cpu_experts=are_any(pipeline.cpu_experts),
            parts=tuple(ceil(mean - _NOTHING) for mean in means(pipeline.parts)),
            states=are_any(pipeline.states),
            attention_weights=are_any(pipeline.attention_weights),
        ),
    )
