"""Which integers are tried: micro-batch sizes, their number, and whose KV cache is on the GPU.

A small space is tried whole. A large one is tried on a grid that is a few per cent apart, and then
at every integer around the best. All solvers search the same integers.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from hrm.schedules import SCHEDULES
from hrm.search.space import Ints, Kind, KvPlace, Space, make_grid

COARSE_CHUNKS: Final = [1, 4, 16]
CHUNKS: Final = [1, 2, 4, 8, 16]
COARSE_KV_SHARES: Final = (0.05, 0.25, 0.6)
WHOLE_PLACES: Final = 2500  # a kind with no more places than this is tried whole
_SIZES: Final = 24
_NUMBERS: Final = 24
_SIZES_OF_ONE: Final = 400
_BATCHES: Final = 8


def whole(space: Space, kind: Kind) -> Ints | None:
    """Every place (micro-batch size, number, KV on the GPU) of a kind; None if they are many."""
    most_sizes, most_numbers = _limits(space)
    sizes = np.arange(1, most_sizes + 1)
    numbers = np.full(most_sizes, most_numbers)
    if space.workload.num_requests is not None:
        numbers = np.minimum(numbers, -(-space.workload.num_requests // sizes))
    counts = numbers * (numbers - 1) // 2 if kind.kv is KvPlace.SOME else numbers
    if counts.sum() > WHOLE_PLACES:
        return None
    return places_of(kind, np.column_stack(_counted_up(sizes, numbers)))


def places_of(kind: Kind, pairs: Ints, shares: tuple[float, ...] | None = None) -> Ints:
    """Pairs of (micro-batch size, number) with the micro-batches whose KV cache is on the GPU.

    Where only some are, all counts are tried, or those nearest to the `shares`.
    """
    if kind.kv is KvPlace.NONE:
        return np.column_stack([pairs, np.zeros(len(pairs), np.int64)])
    if kind.kv is KvPlace.ALL:
        return np.column_stack([pairs, pairs[:, 1]])
    pairs = pairs[pairs[:, 1] > 1]
    if shares is None:
        chosen, on_gpu = _counted_up(np.arange(len(pairs)), pairs[:, 1] - 1)
        return np.column_stack([pairs[chosen], on_gpu])
    on_gpu = np.rint(np.multiply.outer(pairs[:, 1], np.array(shares))).astype(np.int64)
    on_gpu = np.clip(on_gpu, 1, pairs[:, 1:] - 1)
    columns = [np.column_stack([pairs, column]) for column in on_gpu.T]
    return _distinct(np.concatenate(columns))


def coarse(space: Space, kind: Kind) -> Ints:
    """Places over the whole range, a few per cent apart.

    Where the number of requests is given, all that make one, two or more equal batches are among
    them.
    """
    most_sizes, most_numbers = _that_fit(space, kind)
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
        pairs = np.concatenate([pairs, equal])
    return places_of(kind, _levelled(pairs, requests), COARSE_KV_SHARES)


def around(space: Space, kind: Kind, places: Ints, reach: float) -> Ints:
    """Integers around some places: the nearest, and others up to a share of `reach` away."""
    most_sizes, most_numbers = _limits(space)
    sizes, numbers, on_gpu = places.T
    near_sizes = _near(sizes, np.array([-1, -0.5, 0, 0.5, 1]) * reach, most_sizes)
    near_numbers = _near(numbers, np.array([-1, 0, 1]) * reach, most_numbers)
    pairs = np.stack(np.broadcast_arrays(near_sizes[:, :, None], near_numbers[:, None, :]), axis=-1)
    if kind.kv is not KvPlace.SOME:
        pairs = _levelled(pairs.reshape(-1, 2), space.workload.num_requests)
        return places_of(kind, pairs)
    share = (on_gpu / numbers)[:, None, None] * np.ones(pairs.shape[:-1])
    found: list[Ints] = []
    for factor, step in ((1, 0), (1, -1), (1, 1), (1 - 2 * reach, 0), (1 + 2 * reach, 0)):
        counts = np.rint(np.minimum(share * factor, 1) * pairs[..., 1]).astype(np.int64) + step
        counts = np.clip(counts, 1, np.maximum(pairs[..., 1] - 1, 1))
        found.append(np.concatenate([pairs, counts[..., None]], axis=-1).reshape(-1, 3))
    rows = np.concatenate(found)
    rows[:, :2] = _level(rows[:, :2], space.workload.num_requests)
    return _distinct(rows[rows[:, 2] < rows[:, 1]])


def _counted_up(values: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """Every value as often as its count says, beside the numbers from 1 to that count."""
    repeated = np.repeat(values, counts)
    before = np.repeat(np.cumsum(counts) - counts, counts)
    return repeated, np.arange(1, len(repeated) + 1) - before


def _limits(space: Space) -> tuple[int, int]:
    """The greatest micro-batch size and number of micro-batches."""
    requests = space.workload.num_requests
    size = min(space.max_micro_batch_size, requests or space.max_micro_batch_size)
    if SCHEDULES[space.schedule].single_micro_batch:
        return size, 1
    return size, min(space.max_micro_batches, requests or space.max_micro_batches)


def _that_fit(space: Space, kind: Kind) -> tuple[int, int]:
    """Sizes and numbers beyond which nothing fits, with a factor of two to spare."""
    most = _limits(space)
    found: list[int] = []
    for axis in (0, 1):
        powers = 2 ** np.arange(int(most[axis]).bit_length())
        pairs = np.ones((len(powers), 2), np.int64)
        pairs[:, axis] = powers
        on_gpu = pairs[:, 1] if kind.kv is KvPlace.ALL else np.zeros(len(powers), np.int64)
        fits = make_grid(space, kind, np.column_stack([pairs, on_gpu]), [1]).fits
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


def _levelled(pairs: Ints, requests: int | None) -> Ints:
    return _distinct(_level(pairs, requests))


def _level(pairs: Ints, requests: int | None) -> Ints:
    """The smallest micro-batches that finish a given number of requests in as many batches.

    They leave least empty in the last batch, and take less memory.
    """
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
