"""The last step of a search: what the closed form cannot see, tried on the simulation itself."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from hrm.estimate import Estimate
from hrm.policy import Policy, in_whole_layers, spread_experts
from hrm.search.choose import TIE, ranked
from hrm.search.fit import Ints
from hrm.search.grid import ALL_THAT_FIT, make_grid
from hrm.search.lattice import chunk_ranges, levelled, limits, rounded
from hrm.search.result import OPTIMAL_GAP
from hrm.search.scores import score_of, scores
from hrm.search.space import Kind, KvPlace, Space
from hrm.tasks import Device

ROUNDS: Final = 4
_FEW_ROUNDS: Final = 2  # where all layers have as many residents: then the closed form has led nearly there
# Factors by which numbers of micro-batches (of as many requests), their sizes and chunks are changed.
_NUMBERS: Final = (0.5, 0.75, 1.25, 1.5, 2.0)
_SIZES: Final = (0.9, 0.95, 0.98, 1.02, 1.05, 1.1)
_CHUNKS: Final = (0.12, 0.18, 0.25, 0.35, 0.5, 0.6, 0.7, 0.85, 1.2, 1.5, 2.0)
_KV_SHARES: Final = (-0.05, 0.05)  # and by which so much more of the KV cache is on the GPU


def polished(space: Space, simulated: tuple[Estimate, ...], greatest_tokens_per_s: float) -> tuple[Estimate, ...]:
    """The simulated policies, best first, with better ones among them if there are any near by.

    Resident experts may as well be those of whole layers. Micro-batches, their number and caches, and chunks are
    changed one at a time, if that is better in closed form than all that was found or, where waits cost the best more
    than a policy that is called optimal may lie below the closed form, than what it does.
    """
    known = {predicted.policy: predicted for predicted in simulated}
    for number in range(ROUNDS):
        found = ranked(list(known.values()))
        if not found or (number >= _FEW_ROUNDS and _is_even(space, found[0].policy)):
            return found
        first = best = found[0].tokens_per_s
        # The greatest closed form is of residents in all layers alike.
        waits = best < greatest_tokens_per_s * (1 - OPTIMAL_GAP) or not _is_even(space, found[0].policy)
        enough = max(best if waits else greatest_tokens_per_s, space.known_tokens_per_s) * (1 + TIE)
        for policy in (*_in_layers(space, found), *_near(space, found[0].policy, enough)):
            if policy in known:
                continue
            predicted = space.allowed_above(best * (1 - TIE), policy)
            if predicted is not None and predicted.memory.fits:
                known[policy] = predicted
                best = max(best, predicted.tokens_per_s)
        if best <= first * (1 + TIE):
            break
    return ranked(list(known.values()))


def _in_layers(space: Space, found: Sequence[Estimate]) -> list[Policy]:
    """Simulated policies with whole layers resident, best first, if that is better in closed form than the best is."""
    enough = found[0].tokens_per_s * (1 + TIE)
    rates = {policy: score_of(space, policy) for policy in (_in_whole_layers(space, one.policy) for one in found)}
    return sorted((policy for policy, rate in rates.items() if rate > enough), key=lambda policy: -rates[policy])


def _near(space: Space, policy: Policy, enough: float) -> list[Policy]:
    """Policies near by that fit and are better than that in closed form."""
    is_even = _is_even(space, policy)
    grid = make_grid(space, Kind.of_policy(policy), places_near(space, policy, alike_in_all_layers=is_even))
    alike = (grid.resident_dense == policy.resident_dense) & (
        grid.gpu_prefill_ffn == (policy.prefill_ffn is Device.GPU)
    )
    grid = grid.take(np.flatnonzero(grid.fits & alike))
    if is_even:
        return [grid.policy(space, int(index)) for index in np.flatnonzero(scores(space, grid) > enough)]
    near = [_in_whole_layers(space, grid.policy(space, index)) for index in range(len(grid))]
    return [other for other in near if score_of(space, other) > enough]


def _is_even(space: Space, policy: Policy) -> bool:
    residents = policy.resident_experts
    return residents == spread_experts(space.spec, sum(residents))


def _in_whole_layers(space: Space, policy: Policy) -> Policy:
    return replace(policy, resident_experts=in_whole_layers(space.spec, sum(policy.resident_experts)))


def places_near(space: Space, policy: Policy, *, alike_in_all_layers: bool = True) -> Ints:
    """The places of the policy with other micro-batches, another share of the cache on the GPU, and other chunks.

    Chunks are those that the space allows. Where layers differ in their residents, of which the search knows nothing,
    batches are also much smaller or larger.
    """
    size, number = policy.micro_batch_size, policy.num_micro_batches
    most_sizes, most_numbers = limits(space)
    nearest = () if alike_in_all_layers else (-1, 1)
    sizes = rounded(np.append(size * np.array(_SIZES), size + np.array(nearest)))
    numbers = rounded(np.append(number * np.array(_NUMBERS), number + np.array(nearest)))
    numbers = numbers[numbers >= 1]
    pairs = [
        np.column_stack([sizes, np.full(len(sizes), number)]),
        np.column_stack([-(-policy.batch_size // numbers), numbers]),
    ]
    if not alike_in_all_layers:
        pairs.append(np.column_stack([np.full(len(numbers), size), numbers]))
    pairs = np.concatenate(pairs)
    pairs = pairs[(pairs[:, 0] >= 1) & (pairs[:, 0] <= most_sizes) & (pairs[:, 1] <= most_numbers)]
    pairs = levelled(pairs, space.workload.num_requests)
    chunk = policy.prefill_chunk_tokens
    chunks = np.rint(chunk * np.array(_CHUNKS)).astype(np.int64)
    inside = [(tried.least <= chunks) & (chunks <= tried.most) for tried in chunk_ranges(space)]
    chunks = chunks[np.logical_or.reduce(inside)]
    is_some = Kind.of_policy(policy).kv is KvPlace.SOME
    shares = policy.kv_share_on_gpu + np.array(_KV_SHARES if is_some else ())
    columns = [
        (pairs[:, 0], pairs[:, 1], policy.kv_share_on_gpu, chunk),
        (size, number, shares, chunk),
        (size, number, policy.kv_share_on_gpu, chunks),
    ]
    rows = np.concatenate([np.column_stack(np.broadcast_arrays(*each)) for each in columns])
    if is_some:
        rows = rows[rows[:, 1] > 1]
    counts = np.rint(rows[:, 1] * rows[:, 2])
    counts = np.clip(counts, 1, rows[:, 1] - 1) if is_some else counts
    parts = np.full(len(rows), ALL_THAT_FIT)
    return np.column_stack([rows[:, 0], rows[:, 1], counts, parts, rows[:, 3]]).astype(np.int64)
