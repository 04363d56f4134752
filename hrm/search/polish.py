"""The last step of a search: what the closed form cannot see, tried on the simulation itself."""

from typing import Final

import numpy as np

from hrm.estimate import Estimate
from hrm.policy import Policy
from hrm.search.choose import TIE, ranked
from hrm.search.fit import Ints
from hrm.search.grid import ALL_THAT_FIT, CHUNK, make_grid
from hrm.search.lattice import chunk_ranges, levelled, limits, rounded
from hrm.search.result import OPTIMAL_GAP
from hrm.search.scores import scores
from hrm.search.space import Kind, KvPlace, Space
from hrm.tasks import Device

ROUNDS: Final = 2
# Factors by which numbers of micro-batches (of as many requests) and chunks are changed.
_NUMBERS: Final = (0.5, 0.75, 1.25, 1.5, 2.0)
_CHUNKS: Final = (0.5, 0.7, 0.85, 1.2, 1.5, 2.0)


def polished(space: Space, simulated: tuple[Estimate, ...], greatest_tokens_per_s: float) -> tuple[Estimate, ...]:
    """The simulated policies, best first, with better ones among them if there are any near by.

    Only where waits cost the best of them more than a policy that is called optimal may lie below
    the closed form: its number of micro-batches and its chunks are then changed, one at a time.
    """
    known = {predicted.policy: predicted for predicted in simulated}
    for _ in range(ROUNDS):
        found = ranked(list(known.values()))
        if not found or found[0].tokens_per_s >= greatest_tokens_per_s * (1 - OPTIMAL_GAP):
            return found
        best = found[0].tokens_per_s
        for policy in _near(space, found[0], max(best, space.known_tokens_per_s)):
            if policy not in known and (predicted := space.allowed_above(best * (1 - TIE), policy)):
                known[policy] = predicted
                best = max(best, predicted.tokens_per_s)
        if best <= found[0].tokens_per_s * (1 + TIE):
            break
    return ranked(list(known.values()))


def _near(space: Space, best: Estimate, tokens_per_s: float) -> list[Policy]:
    """Policies near by that fit and that might be better than that by their closed form."""
    policy = best.policy
    kind = Kind.of_policy(policy)
    grid = make_grid(space, kind, places_near(space, policy))
    alike = (grid.resident_dense == policy.resident_dense) & (
        grid.gpu_prefill_ffn == (policy.prefill_ffn is Device.GPU)
    )
    grid = grid.take(np.flatnonzero(grid.fits & alike))
    may_win = np.flatnonzero(scores(space, grid) > tokens_per_s * (1 + TIE))
    return [grid.policy(space, int(index)) for index in may_win]


def places_near(space: Space, policy: Policy) -> Ints:
    """The places of the policy with other numbers of micro-batches, and with other chunks, that the space allows."""
    kv, number, share = Kind.of_policy(policy).kv, policy.num_micro_batches, policy.kv_share_on_gpu
    others = rounded(number * np.array(_NUMBERS))
    most_sizes, most_numbers = limits(space)
    others = others[(others >= 1) & (others <= most_numbers)]
    pairs = np.column_stack([-(-policy.batch_size // others), others])
    pairs = pairs[pairs[:, 0] <= most_sizes]
    pairs = levelled(pairs, space.workload.num_requests)
    same = np.array([[policy.micro_batch_size, number]])
    chunk = policy.prefill_chunk_tokens
    chunks = np.rint(chunk * np.array(_CHUNKS)).astype(np.int64)
    ranges = chunk_ranges(space)
    inside = [(r.least <= chunks) & (chunks <= r.most) for r in ranges]
    chunks = chunks[np.logical_or.reduce(inside)]
    rows = np.zeros((len(pairs) + len(chunks), 5), np.int64)
    rows[:, :2] = np.concatenate([pairs, np.repeat(same, len(chunks), axis=0)])
    rows[:, 2] = np.rint(rows[:, 1] * share)
    if kv is KvPlace.SOME:
        rows = rows[rows[:, 1] > 1]
        rows[:, 2] = np.clip(rows[:, 2], 1, rows[:, 1] - 1)
    rows[:, 3] = ALL_THAT_FIT
    rows[:, CHUNK] = np.concatenate([np.full(len(rows) - len(chunks), chunk), chunks])
    return rows
