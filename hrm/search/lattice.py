"""Which integers are tried: micro-batch sizes, their number, and whose KV cache is on the GPU.

A small space is tried whole. A large one is tried on a grid that is a few per cent apart, and then
at every integer around the best.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from hrm.schedules import SCHEDULES
from hrm.search.fit import Ints
from hrm.search.grid import ALL_THAT_FIT, make_grid
from hrm.search.space import Kind, KvPlace, Space

WHOLE_CHUNKS: Final[list[float]] = [1, 2, 4, 8, 16]  # in lengths of the longest prompt
COARSE_CHUNKS: Final = (1, 4, 16)  # of these, tried first; shorter ones are few
LEAST_CHUNK_TOKENS: Final = 128  # shorter ones take hardly less memory, and weights as much time
_SPLIT: Final = 4  # chunks that split the longest prompt are tried in steps of this
COARSE_KV_SHARES: Final = (0.05, 0.25, 0.6)
WHOLE_PLACES: Final = 3000  # a kind with no more places and residencies is tried whole
# Shares up to which integers around the best are tried, round by round.
REACHES: Final = (0.25, 0.12, 0.06, 0.03, 0.015, 0.004)
COARSE_PARTS: Final = (ALL_THAT_FIT, ALL_THAT_FIT // 2)
# Shares of the reach, and micro-batches, by which the KV cache on the GPU is changed.
_KV_STEPS: Final = ((0, 0), (0, -1), (0, 1), (-2, 0), (2, 0))
_SIZES: Final = 24
_NUMBERS: Final = 24
_SIZES_OF_ONE: Final = 400
_BATCHES: Final = 8


def chunk_choices(space: Space) -> list[list[float]]:
    """Chunks that are tried, in lengths of the longest prompt: those that hold it whole.

    A second list has those that split it, if there are any of `LEAST_CHUNK_TOKENS` or more. The
    closed form and the simulation may disagree on which are better, so each is solved by itself.
    """
    share, shares = 1.0, list[float]()
    while (share := share / _SPLIT) * space.workload.max_prompt_len >= LEAST_CHUNK_TOKENS:
        shares.append(share)
    return [WHOLE_CHUNKS, shares[::-1]] if shares else [WHOLE_CHUNKS]


def whole(space: Space, kind: Kind) -> Ints | None:
    """Every place of a kind; None if they are many.

    A place is micro-batch size, number of micro-batches, how many of them have their KV cache on
    the GPU, and which part of the experts that fit are resident: here always all.
    """
    most_sizes, most_numbers = limits(space)
    sizes = np.arange(1, most_sizes + 1)
    numbers = np.full(most_sizes, most_numbers)
    if space.workload.num_requests is not None:
        numbers = np.minimum(numbers, -(-space.workload.num_requests // sizes))
    counts = numbers * (numbers - 1) // 2 if kind.kv is KvPlace.SOME else numbers
    residencies = 1 if kind.gpu_ffn else space.everything + 1
    if counts.sum() * residencies > WHOLE_PLACES:
        return None
    return places_of(kind, np.column_stack(counted_up(sizes, numbers)))


def places_of(kind: Kind, pairs: Ints, shares: tuple[float, ...] | None = None) -> Ints:
    """Places for pairs of (micro-batch size, number), with all residents that fit.

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
    return _distinct(np.column_stack([pairs, on_gpu, np.full(len(pairs), ALL_THAT_FIT)]))


def pairs_of(places: Ints) -> Ints:
    """The distinct pairs of (micro-batch size, number) of some places."""
    return _distinct(places[:, :2])


def coarse(space: Space, kind: Kind, chunks: list[float]) -> Ints:
    """Places over the whole range that fits with the shortest of the chunks, a few per cent apart.

    Where the number of requests is given, all that make one, two or more equal batches are among
    them.
    """
    most_sizes, most_numbers = _that_fit(space, kind, chunks[0])
    if most_numbers == 1:
        sizes, numbers = _spaced(most_sizes, _SIZES_OF_ONE), np.array([1])
    else:
        sizes, numbers = _spaced(most_sizes, _SIZES), _spaced(most_numbers, _NUMBERS)
    pairs = _product(sizes, numbers)
    requests = space.workload.num_requests
    if requests is not None:
        batches = -(-requests // np.arange(1, _BATCHES + 1))
        equal = _product(batches, numbers)
        equal[:, 0] = -(-equal[:, 0] // equal[:, 1])
        pairs = np.concatenate([pairs, equal[equal[:, 0] <= most_sizes]])
    places = places_of(kind, levelled(pairs, requests), COARSE_KV_SHARES)
    return places if kind.gpu_ffn else _with_parts(places, COARSE_PARTS)


def around(space: Space, kind: Kind, places: Ints, reach: float) -> Ints:
    """Integers around some places: the nearest, and others up to a share of `reach` away."""
    most_sizes, most_numbers = limits(space)
    sizes, numbers, on_gpu, parts = places.T
    near_sizes = _near(sizes, np.array([-1, -0.5, 0, 0.5, 1]) * reach, most_sizes)
    near_numbers = _near(numbers, np.array([-1, 0, 1]) * reach, most_numbers)
    pairs = np.stack(np.broadcast_arrays(near_sizes[:, :, None], near_numbers[:, None, :]), axis=-1)
    found: list[Ints] = []
    for factor, step in _KV_STEPS if kind.kv is KvPlace.SOME else ((1, 0),):
        share = (on_gpu / numbers)[:, None, None] * (1 + factor * reach)
        count = np.rint(np.minimum(share, 1) * pairs[..., 1]).astype(np.int64) + step
        part = np.broadcast_to(parts[:, None, None], count.shape)
        found.append(np.stack([pairs[..., 0], pairs[..., 1], count, part], axis=-1).reshape(-1, 4))
    rows = np.concatenate(found)
    rows[:, :2] = _level(rows[:, :2], space.workload.num_requests)
    if kind.kv is KvPlace.SOME:
        rows = rows[rows[:, 1] > 1]
        rows[:, 2] = np.clip(rows[:, 2], 1, rows[:, 1] - 1)
    else:
        rows[:, 2] = rows[:, 1] * (kind.kv is KvPlace.ALL)
    if not kind.gpu_ffn:
        steps = np.array([-2, -1, 1, 2]) * max(round(reach * ALL_THAT_FIT / 2), 1)
        fewer = np.clip(parts[:, None] + steps, 0, ALL_THAT_FIT)
        others = np.repeat(places, len(steps), axis=0)
        others[:, 3] = fewer.ravel()
        rows = np.concatenate([rows, others])
    return _distinct(rows)


def _with_parts(places: Ints, parts: tuple[int, ...]) -> Ints:
    """Every place with each of these parts of the experts that fit."""
    repeated = np.tile(places, (len(parts), 1))
    repeated[:, 3] = np.repeat(parts, len(places))
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


def _that_fit(space: Space, kind: Kind, chunk: float) -> tuple[int, int]:
    """Sizes and numbers beyond which nothing fits, with a factor of two to spare."""
    most = limits(space)
    found: list[int] = []
    for axis in (0, 1):
        powers = 2 ** np.arange(int(most[axis]).bit_length())
        places = np.zeros((len(powers), 4), np.int64)
        places[:, :2] = 1
        places[:, axis] = powers
        places[:, 2] = places[:, 1] * (kind.kv is KvPlace.ALL)
        fits = make_grid(space, kind, places, [chunk]).fits
        each = fits.reshape(len(powers), -1).any(axis=1)
        found.append(min(2 * int(powers[each].max(initial=1)), most[axis]))
    return found[0], found[1]


def _spaced(limit: int, count: int) -> Ints:
    """About `count` integers from 1 to `limit`, evenly spaced in the logarithm."""
    return np.unique(np.rint(np.geomspace(1, limit, count)).astype(np.int64))


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
    return _distinct(_level(pairs, requests))


def _level(pairs: Ints, requests: int | None) -> Ints:
    if requests is None:
        return pairs
    size, number = pairs.T
    batch = -(-requests // -(-requests // (size * number)))
    number = np.minimum(number, batch)
    size = -(-batch // number)
    return np.column_stack([size, np.minimum(number, -(-requests // size))])


def _distinct(rows: NDArray[np.int64]) -> Ints:
    """Rows in order, each once; quicker than np.unique over an axis."""
    if not len(rows):
        return rows
    rows = rows[np.lexsort(rows.T[::-1])]
    return rows[np.concatenate([[True], np.any(rows[1:] != rows[:-1], axis=1)])]
