"""Near ties: of plans that are as fast to a thousandth, one with a smaller batch is better.

It answers sooner and takes less of the host's memory. No prediction is as exact as a thousandth.
"""

from typing import Final

import numpy as np

from hrm.estimate import Estimate
from hrm.policy import Policy
from hrm.search.choose import TIE
from hrm.search.fit import Ints
from hrm.search.grid import ALL_THAT_FIT, QUARTERS, make_grid
from hrm.search.lattice import levelled
from hrm.search.scores import scores
from hrm.search.space import Kind, KvPlace, Space

_SIZES: Final = 48
_SIMULATED: Final = 4  # of the smaller plans that may be as fast


def smallest_first(space: Space, ranked: tuple[Estimate, ...]) -> tuple[Estimate, ...]:
    """The ranking with a smaller plan of the best one's kind first, if one is nearly as fast."""
    if not ranked:
        return ()
    first = ranked[0]
    enough = (1 - TIE) * max(predicted.tokens_per_s for predicted in ranked)
    for policy in _smaller(space, first.policy, enough)[:_SIMULATED]:
        predicted = space.allowed_above(enough, policy)
        if predicted is not None and predicted.tokens_per_s >= enough:
            first = predicted
            break
    return (first, *(other for other in ranked if other is not first))


def _smaller(space: Space, policy: Policy, enough: float) -> list[Policy]:
    """Policies of the same kind with smaller batches that fit, smallest first.

    They have smaller micro-batches, or fewer, and `enough` tokens a second in the closed form.
    """
    kind = Kind.of_policy(policy)
    grid = make_grid(space, kind, _places(space, kind, policy))
    grid = grid.take(np.flatnonzero(grid.fits & (grid.batch_size < policy.batch_size)))
    closed = scores(space, grid)
    near = np.flatnonzero(closed >= enough)
    order = near[np.lexsort((-closed[near], grid.batch_size[near]))]
    return [grid.policy(space, int(index)) for index in order]


def _places(space: Space, kind: Kind, policy: Policy) -> Ints:
    size, number = policy.micro_batch_size, policy.num_micro_batches
    pairs = np.concatenate(
        [
            np.column_stack([_spaced(size), np.full(_SIZES, number)]),
            np.column_stack([np.full(_SIZES, size), _spaced(number)]),
        ]
    )
    pairs = levelled(pairs, space.workload.num_requests)
    pairs = pairs[pairs[:, 1] > 1] if kind.kv is KvPlace.SOME else pairs
    on_gpu = np.rint(policy.kv_share_on_gpu * pairs[:, 1]).astype(np.int64)
    if kind.kv is KvPlace.SOME:
        on_gpu = np.clip(on_gpu, 1, pairs[:, 1] - 1)
    chunk = np.full(len(pairs), policy.prefill_chunk_tokens)
    return np.concatenate(
        [
            np.column_stack([pairs, on_gpu, np.full(len(pairs), round(part * ALL_THAT_FIT)), chunk])
            for part in (QUARTERS[:1] if kind.gpu_ffn else QUARTERS)
        ]
    )


def _spaced(most: int) -> Ints:
    """Integers up to `most`, evenly spaced in the logarithm; some more than once."""
    return np.rint(np.geomspace(1, most, _SIZES)).astype(np.int64)
