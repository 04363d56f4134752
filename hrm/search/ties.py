"""Near ties: of plans that are as fast to a thousandth, the one with the smaller batch is better.

It answers sooner and takes less of the host's memory. No prediction is as exact as a thousandth.
"""

from typing import Final

import numpy as np

from hrm.costs import Costs
from hrm.policy import Policy
from hrm.search.grid import ALL_THAT_FIT, make_grid
from hrm.search.lattice import chunk_choices, levelled
from hrm.search.scores import scores
from hrm.search.space import Kind, KvPlace, Space
from hrm.tasks import Device

NEAR_TIE: Final = 0.001
_SIZES: Final = 48
_PARTS: Final = (1.0, 0.75, 0.5, 0.25, 0.0)  # of the experts that fit, where fewer may be better


def smaller_plans(space: Space, policy: Policy, tokens_per_s: float) -> list[tuple[Policy, float]]:
    """Policies of the same kind with smaller batches, smallest first, each with its closed form.

    In the closed form, none of them is slower than `tokens_per_s` by more than a near tie. They
    have smaller micro-batches, or fewer.
    """
    kind = _kind(policy)
    size, number = policy.micro_batch_size, policy.num_micro_batches
    pairs = np.concatenate(
        [
            np.column_stack([_spaced(size), np.full(_SIZES, number)]),
            np.column_stack([np.full(_SIZES, size), _spaced(number)]),
        ]
    )
    pairs = levelled(pairs, space.workload.num_requests)
    pairs = pairs[pairs[:, 1] > 1] if kind.kv is KvPlace.SOME else pairs
    pairs = pairs[pairs[:, 0] * pairs[:, 1] < policy.batch_size]
    if not len(pairs):
        return []
    share = policy.gpu_kv_micro_batches / number
    on_gpu = np.rint(share * pairs[:, 1]).astype(np.int64)
    if kind.kv is KvPlace.SOME:
        on_gpu = np.clip(on_gpu, 1, pairs[:, 1] - 1)
    parts = (1.0,) if kind.gpu_ffn else _PARTS
    places = np.concatenate(
        [
            np.column_stack([pairs, on_gpu, np.full(len(pairs), round(part * ALL_THAT_FIT))])
            for part in parts
        ]
    )
    chunks = [chunk for some in chunk_choices(space) for chunk in some]
    grid = make_grid(space, kind, places, chunks)
    grid = grid.take(np.flatnonzero(grid.fits))
    closed = scores(space, Costs(space.spec, space.profile, space.dtype), grid)
    near = np.flatnonzero(closed >= (1 - NEAR_TIE) * tokens_per_s)
    order = near[np.lexsort((-closed[near], grid.batch_size[near]))]
    return [(grid.policy(space, int(index)), float(closed[index])) for index in order]


def _kind(policy: Policy) -> Kind:
    on_gpu = policy.gpu_kv_micro_batches
    everywhere = KvPlace.ALL if on_gpu == policy.num_micro_batches else KvPlace.SOME
    return Kind(
        gpu_attention=int(policy.attention is Device.GPU),
        gpu_ffn=int(policy.ffn is Device.GPU),
        kv=everywhere if on_gpu else KvPlace.NONE,
    )


def _spaced(most: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """Integers up to `most`, evenly spaced in the logarithm; some more than once."""
    return np.rint(np.geomspace(1, most, _SIZES)).astype(np.int64)
