"""The last step of a search: what the closed form cannot see, tried on the simulation itself."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hrm.contract.rings import WEIGHT_SLOTS
from hrm.estimate import Estimate
from hrm.memory import plan_memory
from hrm.policy import Policy, in_whole_layers, spread_experts
from hrm.search.bound import CLOSE
from hrm.search.choose import TIE, ranked, simulated_above
from hrm.search.fit import Ints
from hrm.search.grid import ALL_THAT_FIT, Grid, make_grid
from hrm.search.lattice import LEAST_CHUNK_TOKENS, ChunkRange, levelled, limits, rounded
from hrm.search.longest import with_longest_chunks
from hrm.search.result import OPTIMAL_GAP
from hrm.search.scores import score_of, scores
from hrm.search.solver import Found
from hrm.search.space import Kind, KvPlace, Space
from hrm.tasks import Device

ROUNDS: Final = 8
# Factors by which numbers of micro-batches (of as many requests), their sizes and chunks are changed.
_NUMBERS: Final = (0.5, 0.75, 1.25, 1.5, 2.0)
_SIZES: Final = (0.9, 0.95, 0.98, 1.02, 1.05, 1.1)
_NEAREST: Final = (-1, 1)  # and what is added to them
_CHUNKS: Final = (0.12, 0.18, 0.25, 0.35, 0.5, 0.6, 0.7, 0.85, 1.2, 1.5, 2.0)
_OF_WHOLE_LAYERS: Final = 0.05  # by which they may be better than the closed form, which knows means, has them
_MUCH: Final = 0.05  # that waits cost the best of its closed form
_AT_LAST: Final = 6  # of what is near others, that are simulated
_KV_SHARE: Final = 0.05  # of the KV cache that is moved to the GPU, or away from it


def polished(space: Space, found: Found) -> tuple[Estimate, ...]:
    """The simulated policies of what was found, best first, with better ones among them if there are any near by.

    Resident experts may as well be those of whole layers. Micro-batches, their number and caches, chunks, and where
    projections lie and prefill computes experts are changed one at a time; what then does not fit has shorter chunks.
    That is simulated if it is better in closed form than all that was found or, where waits cost the best more than
    a thousandth or two, than what it does: the most promising first, as those that cannot be better than the best that
    is known are not simulated. What was slower once is not tried again. Where nothing near the best is better and
    waits cost much, the most promising near others that are nearly as good are tried before the end.
    """
    ranking: Sequence[Estimate] = found.ranked
    new = ranking
    tried = {*found.slower, *(predicted.policy for predicted in ranking)}
    within = CLOSE
    for _ in range(ROUNDS if ranking else 0):
        best = max(predicted.tokens_per_s for predicted in ranking)  # the first may be a smaller one of near ties
        known = max(best, space.known_tokens_per_s)
        # The greatest closed form is of residents in all layers alike.
        waits = best < found.greatest_tokens_per_s * (1 - CLOSE) or not _is_even(space, ranking[0].policy)
        enough = (known if waits else max(known, found.greatest_tokens_per_s)) * (1 + TIE)
        near = chain.from_iterable(_near(space, centre, enough) for centre in _centres(ranking, within))
        untried = dict.fromkeys(policy for policy in (*_in_layers(space, new, best), *near) if policy not in tried)
        tried.update(untried)
        new = simulated_above(space, known, untried, _AT_LAST if within > CLOSE else None)
        ranking = ranked([*ranking, *new])
        if max((predicted.tokens_per_s for predicted in new), default=0.0) > best * (1 + TIE):
            within = CLOSE
        elif within == CLOSE and best < found.greatest_tokens_per_s * (1 - _MUCH):
            within = OPTIMAL_GAP
        else:
            break
    return ranking


def _centres(found: Sequence[Estimate], within: float) -> list[Policy]:
    """The best policies with all of the cache on the GPU, some of it, and none: waits may cost these unlike much.

    So may they where projections lie elsewhere, which are centres, too, if they are as good as the best to `within`.
    """
    nearly = found[0].tokens_per_s * (1 - within)
    worst_first = found[::-1]
    best = {Kind.of_policy(one.policy).kv: one.policy for one in worst_first}
    others = {one.policy.resident_dense: one.policy for one in worst_first if one.tokens_per_s >= nearly}
    return list(dict.fromkeys([*best.values(), *others.values()]))


def _in_layers(space: Space, found: Sequence[Estimate], best_tokens_per_s: float) -> list[Policy]:
    """Simulated policies with whole layers resident, best first, if that may be better than the best is.

    Where the CPU computes the others, few in all layers may be worse than none, and whole layers better.
    """
    enough = best_tokens_per_s * (1 - _OF_WHOLE_LAYERS)
    policies = [one.policy for one in found]
    policies += [_with_all_that_fit(space, policy) for policy in policies if policy.ffn is Device.CPU]
    rates = {policy: score_of(space, policy) for policy in (_in_whole_layers(space, policy) for policy in policies)}
    return sorted((policy for policy, rate in rates.items() if rate > enough), key=lambda policy: -rates[policy])


def _with_all_that_fit(space: Space, policy: Policy) -> Policy:
    """The policy with as many residents as fit."""
    number, held, chunk = policy.num_micro_batches, policy.gpu_kv_micro_batches, policy.prefill_chunk_tokens
    place = np.array([[policy.micro_batch_size, number, held, ALL_THAT_FIT, chunk]])
    grid = make_grid(space, Kind.of_policy(policy), place)
    totals = grid.resident_total[_is_alike(grid, policy)].tolist()  # none where prefill only runs there as all do
    return replace(policy, resident_experts=spread_experts(space.spec, totals[0])) if totals else policy


def _is_alike(grid: Grid, policy: Policy) -> NDArray[np.bool_]:
    """Where projections lie and prefill computes experts as in the policy."""
    in_prefill = policy.prefill_ffn is Device.GPU
    return (grid.resident_dense == policy.resident_dense) & (grid.gpu_prefill_ffn == in_prefill)


def _near(space: Space, policy: Policy, enough: float) -> list[Policy]:
    """Policies near by that fit and are better than that in closed form."""
    kind, places = Kind.of_policy(policy), places_near(space, policy)
    grid = make_grid(space, kind, places)
    own = len(grid) // len(places)  # candidates of the policy's own place, which come first
    shorter = ChunkRange(min(_least_chunk(space), policy.prefill_chunk_tokens), policy.prefill_chunk_tokens)
    grid = grid.and_also(with_longest_chunks(space, kind, shorter, places))
    alike = _is_alike(grid, policy)
    alike[:own] = True
    grid = grid.take(np.flatnonzero(grid.fits & alike))
    if _is_even(space, policy):
        near = [grid.policy(space, int(index)) for index in np.flatnonzero(scores(space, grid) > enough)]
        return list(dict.fromkeys(near))
    others = (_in_whole_layers(space, grid.policy(space, index)) for index in range(len(grid)))
    near = dict.fromkeys([_one_layer_on(space, policy), *others])
    return [other for other in near if score_of(space, other) > enough]


def _is_even(space: Space, policy: Policy) -> bool:
    residents = policy.resident_experts
    return residents == spread_experts(space.spec, sum(residents))


def _in_whole_layers(space: Space, policy: Policy) -> Policy:
    """The policy with its residents in whole layers, or with as many as fit beside slots for the others."""
    total = sum(policy.resident_experts)
    fewer = max(total - WEIGHT_SLOTS * (total // space.spec.num_expert_layers), 0)
    tried = (replace(policy, resident_experts=in_whole_layers(space.spec, count)) for count in (total, fewer))
    return next((other for other in tried if plan_memory(space.spec, other, space.profile).fits), policy)


def _one_layer_on(space: Space, policy: Policy) -> Policy:
    """The policy with each layer's residents in the next one that has experts: the first may be waited for longest."""
    layers = [layer for layer, kind in enumerate(space.spec.layers) if kind.has_experts]
    counts = list(policy.resident_experts)
    for layer, before in zip(layers, [layers[-1], *layers[:-1]], strict=True):
        counts[layer] = policy.resident_experts[before]
    return replace(policy, resident_experts=tuple(counts))


def places_near(space: Space, policy: Policy) -> Ints:
    """The policy's own place, then those with other micro-batches, another share of the cache on the GPU, other chunks.

    Chunks are no shorter than those that the search tries of long prompts, and of short ones they split none.
    """
    size, number, chunk = policy.micro_batch_size, policy.num_micro_batches, policy.prefill_chunk_tokens
    share, pairs = policy.kv_share_on_gpu, _pairs_near(space, policy)
    chunks = np.rint(chunk * np.array(_CHUNKS)).astype(np.int64)
    chunks = chunks[chunks >= _least_chunk(space)]
    columns = [(size, number, share, chunk), (pairs[:, 0], pairs[:, 1], share, chunk), (size, number, share, chunks)]
    rows = np.concatenate([np.column_stack(np.broadcast_arrays(*each)) for each in columns])
    rows[:, 2] = np.rint(rows[:, 1] * rows[:, 2])
    if Kind.of_policy(policy).kv is KvPlace.SOME:
        rows = rows[rows[:, 1] > 1]
        rows[:, 2] = np.clip(rows[:, 2], 1, rows[:, 1] - 1)
    of_cache = np.column_stack(np.broadcast_arrays(size, number, _caches_near(space, policy), chunk))
    rows = np.concatenate([rows, of_cache]).astype(np.int64)
    return np.column_stack([rows[:, :3], np.full(len(rows), ALL_THAT_FIT), rows[:, 3]])


def _pairs_near(space: Space, policy: Policy) -> Ints:
    """Other sizes of micro-batches, and other numbers of them: of as many requests, and of as large ones."""
    size, number = policy.micro_batch_size, policy.num_micro_batches
    most_sizes, most_numbers = limits(space)
    nearest = () if _is_even(space, policy) else _NEAREST  # of numbers the search has tried these there
    sizes, numbers = (
        rounded(np.append(now * np.array(factors), now + np.array(steps)))
        for now, factors, steps in ((size, _SIZES, _NEAREST), (number, _NUMBERS, nearest))
    )
    numbers = numbers[numbers >= 1]
    pairs = np.concatenate(
        [
            np.column_stack(np.broadcast_arrays(sizes, number)),
            np.column_stack([-(-policy.batch_size // numbers), numbers]),
            np.column_stack(np.broadcast_arrays(size, numbers)),
        ]
    )
    pairs = pairs[(pairs[:, 0] >= 1) & (pairs[:, 0] <= most_sizes) & (pairs[:, 1] <= most_numbers)]
    return levelled(pairs, space.workload.num_requests)


def _caches_near(space: Space, policy: Policy) -> Ints:
    """Other numbers of micro-batches that have their cache on the GPU, as far as the space allows."""
    number, held = policy.num_micro_batches, policy.gpu_kv_micro_batches
    few = _KV_SHARE * number
    near = rounded(np.clip([held - few, held - 1, held + 1, held + few], 0, number))
    allowed = {kind.kv for kind in space.kinds()}
    return near[[KvPlace.of(int(count), number) in allowed for count in near]]


def _least_chunk(space: Space) -> int:
    """Tokens of the shortest chunk that is tried: a part of a prompt only if that is long."""
    longest = space.workload.max_prompt_len
    return LEAST_CHUNK_TOKENS if longest >= 2 * LEAST_CHUNK_TOKENS else longest
