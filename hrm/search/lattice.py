"""Which integers are tried: micro-batch sizes, their number, and whose KV cache is on the GPU.

A small space is tried whole. A large one is tried on a grid that is a few per cent apart, and then
at every integer around the best.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hrm.schedules import SCHEDULES
from hrm.search.fit import Ints
from hrm.search.grid import ALL_THAT_FIT, CHUNK, PART, make_grid
from hrm.search.space import Kind, KvPlace, Space

LEAST_CHUNK_TOKENS: Final = 128  # shorter ones take hardly less memory, and weights as much time
MOST_CHUNK_TOKENS: Final = 2**20
_COARSE_CHUNKS: Final = 4  # chunks are first tried in steps of this factor
_FEWEST_PARTS: Final = 4  # into which a prompt is split, if any
COARSE_KV_SHARES: Final = (0.05, 0.25, 0.6)
WHOLE_PLACES: Final = 3000  # a kind with no more places and residencies is tried whole
# Shares up to which integers around the best are tried, round by round.
REACHES: Final = (0.25, 0.12, 0.06, 0.03, 0.015, 0.004)
COARSE_PARTS: Final = (ALL_THAT_FIT, ALL_THAT_FIT // 2)
# Shares of the reach, and micro-batches, by which the KV cache on the GPU is changed.
_KV_STEPS: Final = ((0, 0), (0, -1), (0, 1), (-2, 0), (2, 0))
_CHUNK_STEPS: Final = (-8, -4, -2, -1, 1, 2, 4, 8)  # in the reach, as powers of e
_SIZES: Final = 24
_NUMBERS: Final = 24
_SIZES_OF_ONE: Final = 400
_BATCHES: Final = 8


@dataclass(frozen=True, slots=True)
class ChunkRange:
    """Chunks of `least` to `most` tokens."""

    least: int
    most: int

    def spaced(self, factor: float) -> list[int]:
        """Chunks a factor apart, the least and the most among them."""
        count = int(math.log(self.most / self.least, factor))
        return sorted({*(round(self.least * factor**i) for i in range(count + 1)), self.most})


def chunk_ranges(space: Space) -> list[ChunkRange]:
    """Chunks that are tried: those that hold the longest prompt whole, and those that split it.

    The second are there if prompts are long enough. The closed form and the simulation may disagree
    on which are better, so each is solved by itself.
    """
    w = space.workload
    longest = w.max_prompt_len
    every_prompt = (w.num_requests or MOST_CHUNK_TOKENS) * w.prompt_len
    whole = ChunkRange(longest, max(min(math.ceil(every_prompt), MOST_CHUNK_TOKENS), longest))
    if longest < _FEWEST_PARTS * LEAST_CHUNK_TOKENS:
        return [whole]
    return [whole, ChunkRange(LEAST_CHUNK_TOKENS, longest // _FEWEST_PARTS)]


def whole(space: Space, kind: Kind, chunks: ChunkRange) -> Ints | None:
    """Every place of a kind, with chunks a factor of two apart; None if they are many.

    A place is micro-batch size, number of micro-batches, how many of them have their KV cache on
    the GPU, which part of the experts that fit are resident (here always all), and chunk tokens.
    """
    most_sizes, most_numbers = limits(space)
    if most_sizes > WHOLE_PLACES:
        return None
    sizes = np.arange(1, most_sizes + 1)
    numbers = np.full(most_sizes, most_numbers)
    if space.workload.num_requests is not None:
        numbers = np.minimum(numbers, -(-space.workload.num_requests // sizes))
    counts = numbers * (numbers - 1) // 2 if kind.kv is KvPlace.SOME else numbers
    residencies = 1 if kind.gpu_ffn else space.everything + 1
    if counts.sum() * residencies > WHOLE_PLACES:
        return None
    return places_of(kind, np.column_stack(counted_up(sizes, numbers)), chunks.spaced(2))


def places_of(kind: Kind, pairs: Ints, chunks: list[int], shares: tuple[float, ...] | None = None) -> Ints:
    """Places for pairs of (micro-batch size, number) and chunks, with all residents that fit.

    Where some micro-batches have their KV cache on the GPU, all counts are tried, or those nearest
    to the `shares`.
    """
    if kind.kv is KvPlace.SOME:
        pairs = pairs[pairs[:, 1] > 1]
        if shares is None:
            chosen, on_gpu = counted_up(np.arange(len(pairs)), pairs[:, 1] - 1)
            pairs = pairs[chosen]
        else:
            on_gpu = np.rint(np.multiply.outer(np.array(shares), pairs[:, 1])).astype(np.int64)
            on_gpu = np.clip(on_gpu, 1, pairs[:, 1] - 1).ravel()
            pairs = np.tile(pairs, (len(shares), 1))
    else:
        on_gpu = pairs[:, 1] if kind.kv is KvPlace.ALL else np.zeros(len(pairs), np.int64)
    chunk = np.full(len(pairs), chunks[0])
    rows = np.column_stack([pairs, on_gpu, np.full(len(pairs), ALL_THAT_FIT), chunk])
    return _with_each(distinct(rows), CHUNK, chunks)


def with_most_residents(places: Ints, chunk: int) -> Ints:
    """The distinct places with all residents that fit and such chunks."""
    places = places.copy()
    places[:, PART], places[:, CHUNK] = ALL_THAT_FIT, chunk
    return distinct(places)


def pairs_of(places: Ints) -> Ints:
    """The distinct pairs of (micro-batch size, number) of some places."""
    return distinct(places[:, :2])


def chunks_of(places: Ints) -> list[int]:
    """The distinct chunks of some places."""
    return np.unique(places[:, CHUNK]).tolist()


def coarse(space: Space, kind: Kind, chunks: ChunkRange, most_numbers_tried: int = _NUMBERS) -> Ints:
    """Places over the whole range that fits with the shortest of the chunks, by default a few per cent apart.

    Where the number of requests is given, all that make one, two or more equal batches are among
    them.
    """
    most_sizes, most_numbers = _that_fit(space, kind, chunks.least)
    if most_numbers == 1:
        sizes, numbers = _spaced(most_sizes, _SIZES_OF_ONE), np.array([1])
    else:
        sizes, numbers = _spaced(most_sizes, _SIZES), _spaced(most_numbers, most_numbers_tried)
    pairs = _product(sizes, numbers)
    requests = space.workload.num_requests
    if requests is not None:
        batches = -(-requests // np.arange(1, _BATCHES + 1))
        equal = _product(batches, numbers)
        equal[:, 0] = -(-equal[:, 0] // equal[:, 1])
        pairs = np.concatenate([pairs, equal[equal[:, 0] <= most_sizes]])
    tried = _chunks_that_fit(space, kind, chunks.spaced(_COARSE_CHUNKS))
    places = places_of(kind, levelled(pairs, requests), tried, COARSE_KV_SHARES)
    return places if kind.gpu_ffn else _with_each(places, PART, COARSE_PARTS)


def around(space: Space, kind: Kind, chunks: ChunkRange, places: Ints, reach: float) -> Ints:
    """Integers around some places: the nearest, and others up to a share of `reach` away."""
    most_sizes, most_numbers = limits(space)
    sizes, numbers, on_gpu, *others = places.T
    near_sizes = _near(sizes, np.array([-1, -0.5, 0, 0.5, 1]) * reach, most_sizes)
    near_numbers = _near(numbers, np.array([-1, 0, 1]) * reach, most_numbers)
    pairs = np.stack(np.broadcast_arrays(near_sizes[:, :, None], near_numbers[:, None, :]), axis=-1)
    found: list[Ints] = []
    for factor, step in _KV_STEPS if kind.kv is KvPlace.SOME else ((1, 0),):
        share = (on_gpu / numbers)[:, None, None] * (1 + factor * reach)
        count = np.rint(np.minimum(share, 1) * pairs[..., 1]).astype(np.int64) + step
        kept = [np.broadcast_to(other[:, None, None], count.shape) for other in others]
        columns = [pairs[..., 0], pairs[..., 1], count, *kept]
        found.append(np.stack(columns, axis=-1).reshape(-1, len(columns)))
    rows = np.concatenate(found)
    rows[:, :2] = _level(rows[:, :2], space.workload.num_requests)
    if kind.kv is KvPlace.SOME:
        rows = rows[rows[:, 1] > 1]
        rows[:, 2] = np.clip(rows[:, 2], 1, rows[:, 1] - 1)
    else:
        rows[:, 2] = rows[:, 1] * (kind.kv is KvPlace.ALL)
    steps = np.exp(np.array(_CHUNK_STEPS) * reach)
    longer = np.rint(places[:, CHUNK, None] * steps).astype(np.int64)
    moved = [rows, _with(places, CHUNK, np.clip(longer, chunks.least, chunks.most))]
    if not kind.gpu_ffn:
        steps = np.array([-2, -1, 1, 2]) * max(round(reach * ALL_THAT_FIT / 2), 1)
        moved.append(_with(places, PART, np.clip(places[:, PART, None] + steps, 0, ALL_THAT_FIT)))
    return distinct(np.concatenate(moved))


def _with_each(places: Ints, column: int, values: Sequence[int]) -> Ints:
    """Every place with each of these values in a column."""
    return _with(places, column, np.broadcast_to(np.array(values), (len(places), len(values))))


def _with(places: Ints, column: int, values: Ints) -> Ints:
    """Every place as often as it has values, which take the place of a column's."""
    repeated = np.repeat(places, values.shape[1], axis=0)
    repeated[:, column] = values.ravel()
    return repeated


def counted_up(values: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """Every value as often as its count says, beside the numbers from 1 to that count."""
    repeated = np.repeat(values, counts)
    before = np.repeat(np.cumsum(counts) - counts, counts)
    return repeated, np.arange(1, len(repeated) + 1) - before


def limits(space: Space) -> tuple[int, int]:
    """The greatest micro-batch size and number of micro-batches."""
    requests = space.workload.num_requests
    size = min(space.max_micro_batch_size, requests or space.max_micro_batch_size)
    if SCHEDULES[space.schedule].single_micro_batch:
        return size, 1
    return size, min(space.max_micro_batches, requests or space.max_micro_batches)


def _that_fit(space: Space, kind: Kind, chunk: int) -> tuple[int, int]:
    """Sizes and numbers beyond which nothing fits, with a factor of two to spare."""
    most = limits(space)
    powers = [2 ** np.arange(limit.bit_length()) for limit in most]
    places = np.ones((sum(map(len, powers)), 5), np.int64)
    places[: len(powers[0]), 0], places[len(powers[0]) :, 1] = powers
    places[:, CHUNK] = chunk
    fits = np.split(_some_fit(space, kind, places), [len(powers[0])])
    size, number = (int(tried[fit].max(initial=1)) for tried, fit in zip(powers, fits, strict=True))
    return min(2 * size, most[0]), min(2 * number, most[1])


def _chunks_that_fit(space: Space, kind: Kind, chunks: list[int]) -> list[int]:
    """The chunks that fit beside the least of everything else; the first if none does."""
    places = np.ones((len(chunks), 5), np.int64)
    places[:, CHUNK] = chunks
    # A chunk is no longer than all prompts of a batch, so this takes requests.
    places[:, 1] = np.minimum(-(-places[:, CHUNK] // math.ceil(space.workload.prompt_len)), limits(space)[1])
    fits = _some_fit(space, kind, places)
    return [chunk for chunk, fit in zip(chunks, fits, strict=True) if fit] or chunks[:1]


def _some_fit(space: Space, kind: Kind, places: Ints) -> NDArray[np.bool_]:
    """Whether the places fit with any residency and any share of the KV cache that is the kind's.

    Either memory may be the smaller one: a host too small for the weights takes all the residents
    that fit the GPU, and a GPU with little room none.
    """
    shares = {KvPlace.NONE: (0,), KvPlace.SOME: (0, 1), KvPlace.ALL: (1,)}[kind.kv]
    tried = np.concatenate([_with(places, 2, places[:, 1, None] * share) for share in shares])
    tried = np.concatenate([_with_each(tried, PART, [part]) for part in (0, ALL_THAT_FIT)])
    fits = make_grid(space, kind, tried).fits.reshape(2 * len(shares), len(places), -1)
    return np.logical_or.reduce(fits, axis=(0, 2))


def _spaced(limit: int, count: int) -> Ints:
    """About `count` integers from 1 to `limit`, evenly spaced in the logarithm."""
    return rounded(np.geomspace(1, limit, count))


def rounded(values: NDArray[np.float64]) -> Ints:
    """The nearest integers in order, each once; np.unique would first load all of numpy.ma."""
    whole = np.sort(np.rint(values).astype(np.int64))
    return whole[np.append(True, whole[1:] != whole[:-1])]


def _near(values: Ints, shares: NDArray[np.float64], limit: int) -> Ints:
    """Every value with its neighbours, and with what is some share of it away."""
    far = np.rint(values[:, None] * (1 + shares)).astype(np.int64)
    return np.clip(np.concatenate([far, values[:, None] + np.array([-1, 1])], axis=1), 1, limit)


def _product(sizes: Ints, numbers: Ints) -> Ints:
    return np.stack(np.meshgrid(sizes, numbers), axis=-1).reshape(-1, 2)


def levelled(pairs: Ints, requests: int | None) -> Ints:
    """The smallest micro-batches that finish a given number of requests in as many batches.

    They leave least empty in the last batch, and take less memory. Of equal pairs one is left.
    """
    return distinct(_level(pairs, requests))


def _level(pairs: Ints, requests: int | None) -> Ints:
    if requests is None:
        return pairs
    size, number = pairs.T
    batch = -(-requests // -(-requests // (size * number)))
    number = np.minimum(number, batch)
    size = -(-batch // number)
    return np.column_stack([size, np.minimum(number, -(-requests // size))])


def distinct(rows: NDArray[np.int64]) -> Ints:
    """Rows in order, each once; quicker than np.unique over an axis."""
    if not len(rows):
        return rows
    rows = rows[np.lexsort(rows.T[::-1])]
    return rows[np.concatenate([[True], np.any(rows[1:] != rows[:-1], axis=1)])]
