"""An upper bound on the throughput of every policy of a space, by branch and bound.

No policy is tried here. A region is a range of micro-batch sizes, numbers of micro-batches, shares
of the KV cache on the GPU, resident experts and chunks, all of them real numbers. Nothing in it is
quicker than its best corner, where every piece of work is as cheap for a request as it gets
anywhere in the region, and nothing in it fits if its smallest corner does not. The last batch of a
job may be smaller than the others: a larger share of its caches is on the GPU, up to all of them,
and it may be prefilled in one chunk where the others are in several. Regions that might
hold something better than what is known are halved until none is left, or until the budget is
spent; the highest ceiling that remains is the bound.

What makes the best corner a bound: work costs a request no more in a larger micro-batch, and no
more in more of them; a larger chunk makes prefill no dearer; and whatever depends on the share of
the cache or on resident experts lies, between two values of these, above the lower one of both
ends. Rates of a profile that fall with size are raised until this holds (`smoothed`).
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hrm.closed_form import Point, batch_terms, stacked
from hrm.costs import Costs
from hrm.lane_work import CHAIN
from hrm.layers import Layer
from hrm.numeric import Number
from hrm.policy import ScheduleName
from hrm.schedules import SCHEDULES
from hrm.schedules.orders import lookahead
from hrm.search.regions import CHUNK, KV, NUMBER, RESIDENT, SIZE, Floats, Regions
from hrm.search.result import OPTIMAL_GAP
from hrm.search.room import Room
from hrm.search.smooth import smoothed
from hrm.search.space import Kind, KvPlace, Space

LARGEST: Final = 2.0**24  # micro-batch size, number of micro-batches
FEW_REGIONS: Final = 6144  # within which a bound should show that a way is not worth a search, if it is to
BUDGET: Final = 16_000  # regions; so many more, up to the second, only as long as they may tell
LARGEST_BUDGET: Final = 64_000  # whether the best that is known may be called optimal
ROUND: Final = 2048  # regions that are halved at once
AT_ONCE: Final = 512  # that are looked at in one go, at least, if there is enough to halve
PROGRESS: Final = 0.9  # of the excess over what is known is left at most, if it pays to look at twice as many regions
CLOSE: Final = 2e-3  # a region that is better by no more is not halved
_NEARLY: Final = 1 - 1e-9  # all of the last layer: it may be that none of it is
_ALONE: Final = CHAIN + 2  # that of a lone micro-batch where experts stream in parts, after one more of these
# The schedules whose every term is cheapest at the best corner; of others only the lanes are taken.
_ALL_TERMS: Final = {ScheduleName.CGOPIPE, ScheduleName.DEEPSPEED}
PhaseTerms = list[tuple[Floats, Floats]]  # weights of (contexts, 1), terms of (terms, contexts, regions)


@dataclass(frozen=True, slots=True)
class Bound:
    """No policy of the space generates more than `tokens_per_s`; 0 if none fits.

    `regions` were looked at. Policies that are better than what is known, if there are any, are of these `kinds`; None
    stands for all.
    """

    tokens_per_s: float
    regions: int
    kinds: frozenset[Kind] | None = None


NO_BOUND: Final = Bound(inf, 0)


def greatest(bounds: Iterable[Bound]) -> Bound:
    """One on all of what these are on."""
    bounds = list(bounds)
    kinds = [bound.kinds for bound in bounds]
    return Bound(
        tokens_per_s=max((bound.tokens_per_s for bound in bounds), default=0.0),
        regions=sum(bound.regions for bound in bounds),
        kinds=None if None in kinds else frozenset[Kind]().union(*filter(None, kinds)),
    )


class Bounding:
    """The bound of a space, which can be asked for again when more is known: it goes on with the regions left."""

    def __init__(self, space: Space) -> None:
        self._bounder = Bounder(space)
        self._known_tokens_per_s = 0.0
        self._begin()

    def _begin(self) -> None:
        self._regions, self._ceilings = self._bounder.bounded(self._bounder.everything())
        self._looked_at, self._settled, self._kinds = len(self._ceilings), 0.0, frozenset[Kind]()

    def go_on(self, known_tokens_per_s: float = 0.0, most_regions: int = LARGEST_BUDGET) -> Bound:
        """No more than about so many regions are looked at, those of before among them.

        What is within `CLOSE` of the known throughput is not looked into.
        """
        if known_tokens_per_s < self._known_tokens_per_s:  # what was settled may be of interest again
            self._begin()
        self._known_tokens_per_s = known_tokens_per_s
        enough = known_tokens_per_s * (1 + CLOSE)
        highest: list[tuple[int, float]] = []  # ceiling when so many had been looked at
        while len(self._ceilings):
            self._settle(enough)
            if not len(self._ceilings) or self._looked_at >= most_regions:
                break
            highest.append((self._looked_at, float(self._ceilings.max())))
            if self._looked_at >= BUDGET and _is_enough(highest, known_tokens_per_s):
                break
            self._divide()
        kinds = self._kinds | self._bounder.kinds_in(self._regions)
        return Bound(max(self._settled, float(self._ceilings.max(initial=0.0))), self._looked_at, kinds)

    def _settle(self, enough: float) -> None:
        """Put aside what is not looked into."""
        regions, ceilings = self._regions, self._ceilings
        small = (ceilings <= enough) | self._bounder.cannot_halve(regions)
        self._settled = max(self._settled, float(ceilings[small].max(initial=0.0)))
        if (above := small & (ceilings > enough)).any():
            self._kinds |= self._bounder.kinds_in(regions.take(above))
        self._regions, self._ceilings = regions.take(~small), ceilings[~small]

    def _divide(self) -> None:
        """Halve those with the highest ceilings."""
        order = np.argsort(-self._ceilings, kind="stable")
        first, rest = order[:ROUND], order[ROUND:]
        halves = self._bounder.divided(self._regions.take(first))
        self._looked_at += len(halves)
        halves, of_halves = self._bounder.bounded(halves)
        self._regions = self._regions.take(rest).and_also(halves)
        self._ceilings = np.concatenate([self._ceilings[rest], of_halves])


def _is_enough(highest: Sequence[tuple[int, float]], known_tokens_per_s: float) -> bool:
    """Whether more regions would tell no more: the best known is nearly as good, or half of them told hardly any."""
    looked_at, now = highest[-1]
    before = highest[bisect_right(highest, (looked_at / 2, inf)) - 1][1]
    excess = now - known_tokens_per_s
    return now * (1 - OPTIMAL_GAP) <= known_tokens_per_s or excess > PROGRESS * (before - known_tokens_per_s)


class _LeastCosts(Costs):
    """Costs of layers of which only the mean number of resident experts is known."""

    def after_attention(self, m: Number, gpu_experts: Number, kind: Layer) -> Number:
        """No less than where as few layers as possible have all of these experts, and the others none.

        The first of a layer's experts cost more than the others: their launches, and the busiest of ranks.
        """
        least, most = (super(_LeastCosts, self).after_attention(m, count, kind) for count in (0, kind.num_experts))
        return least + gpu_experts / max(kind.num_experts, 1) * (most - least)


class Bounder:
    """Ceilings of the regions of one space."""

    def __init__(self, space: Space) -> None:
        self.space, self.spec = space, space.spec
        self.room = Room(space)
        self.costs = _LeastCosts(space.spec, smoothed(space.profile), space.formats)
        self.requests = space.workload.num_requests

    def everything(self) -> Regions:
        """A region for each way to place attention, experts and projections: the whole space."""
        space, spec = self.space, self.spec
        schedule = SCHEDULES[space.schedule]
        one_level = not space.profile.has_accelerator
        most = float(min(self.requests or LARGEST, LARGEST))
        longest = space.workload.max_prompt_len
        chunk = max(longest, most * most * space.workload.prompt_len)
        if self.requests:
            chunk = max(longest, self.requests * space.workload.prompt_len)
        kv_low = float(one_level or schedule.kv_on_gpu)
        ways: list[tuple[float, ...]] = []
        for attention, ffn in space.devices():
            for dense in (1,) if one_level else (1, 0):
                # With all experts resident it is one whether the others would run here or there.
                resident = spec.num_experts if one_level else 0
                least = 0.0 if ffn else 1.0 / spec.num_expert_layers
                ways += [
                    (attention, ffn, prefill, dense, resident, spec.num_experts - least)
                    for prefill in space.prefill_devices(ffn)
                ]
                if (attention, 1) not in space.devices():
                    ways.append((attention, 1, 1, dense, spec.num_experts, spec.num_experts))
        ways = [(*way, one_chunk) for way in ways for one_chunk in (0, 1)]
        columns = np.array(ways, dtype=float).T
        ones = np.ones(len(ways))
        number = 1.0 if schedule.single_micro_batch else most
        return Regions(
            gpu_attention=columns[0],
            gpu_ffn=columns[1],
            gpu_prefill=columns[2],
            dense=columns[3],
            one_chunk=columns[6],
            low=np.stack([ones, ones, kv_low * ones, columns[4], ones]),
            high=np.stack([most * ones, number * ones, ones, columns[5], chunk * ones]),
        )

    def kinds_in(self, regions: Regions) -> frozenset[Kind]:
        """The kinds of policies that regions may hold; with all experts resident, of the GPU's FFN if it may."""
        devices, (low, high) = self.space.devices(), (regions.low[KV], regions.high[KV])
        of_place = {KvPlace.NONE: low <= 0, KvPlace.SOME: (low < 1) & (high > 0), KvPlace.ALL: high >= 1}
        found: set[Kind] = set()
        for kind in self.space.kinds():
            held = of_place[kind.kv] & ((regions.gpu_attention == kind.gpu_attention) | (kind.kv is KvPlace.ALL))
            if (kind.gpu_attention, 1) in devices:
                held &= regions.gpu_ffn == kind.gpu_ffn
            if held.any():
                found.add(kind)
        return frozenset(found)

    def bounded(self, regions: Regions) -> tuple[Regions, Floats]:
        """The regions that may fit, made smaller, and the tokens a second that they may reach."""
        regions = self.room.tightened(regions)
        if not len(regions):
            return regions, np.zeros(0)
        batch = self.room.largest_batch(regions)
        phases = self._seconds_a_request(regions, batch)
        if self.requests is not None and (self.requests > batch).any():
            batches = np.ceil(self.requests / batch - 1e-9)
            phases = self._at_least_of_batches(regions, phases, batches, self.requests)
        seconds = np.zeros(len(regions))
        for weights, terms in phases:
            seconds += (weights * np.maximum.reduce(terms)).sum(axis=0)
        return regions, self.space.workload.generated_tokens / seconds

    def _seconds_a_request(self, regions: Regions, batch: Floats) -> PhaseTerms:
        """The terms' shares of a request where all are least, in a batch of at most so many.

        They are means over the requests of whole batches and those of a smaller last one.
        """
        found = self._least_seconds(regions, batch)
        of_last = self._share_of_last_batch(regions, batch)
        more_at_once = regions.high[CHUNK] > batch * self.space.workload.prompt_len / 2
        differs = _splits_cache(regions) | ((regions.one_chunk == 0) & more_at_once)
        chosen = np.flatnonzero(differs & (of_last > 0))
        if not len(chosen):
            return found
        of_lasts = self._least_seconds(_with_last_batches(regions.take(chosen)), batch[chosen], least_chunks=1)
        for (_, terms), (_, last_terms) in zip(found, of_lasts, strict=True):
            terms[..., chosen] += of_last[chosen] * np.minimum(last_terms - terms[..., chosen], 0.0)
        return found

    def _share_of_last_batch(self, regions: Regions, batch: Floats) -> Floats:
        """The greatest share of the job's requests that can be in a batch smaller than the others."""
        if self.requests is None:
            return np.zeros(len(regions))
        least = np.minimum(regions.low[SIZE] * regions.low[NUMBER], batch)
        most_whole, fewest_whole = np.floor(self.requests / least), np.floor(self.requests / batch)
        any_rest = np.minimum(batch, self.requests / 2)
        rest = np.where(most_whole == fewest_whole, self.requests - most_whole * least, any_rest)
        return rest / self.requests

    def _least_seconds(self, regions: Regions, batch: Floats, *, least_chunks: int = 2) -> PhaseTerms:
        """The terms' shares of a request in a batch of at most so many, each where it is least."""
        size = np.minimum(regions.high[SIZE], batch / regions.low[NUMBER])
        number = batch / size
        prefill, decode = self._phase_terms(regions, size, number, least_chunks=least_chunks)
        # Of a chain of tasks, as many are under way as there are micro-batches, up to a few.
        most = lookahead(regions.high[NUMBER]) + 1
        under_way = np.minimum(number, most) / np.minimum(regions.high[NUMBER], most)
        decode[1][CHAIN] *= np.minimum(under_way, 1.0)
        return [(weights, terms / batch) for weights, terms in (prefill, decode)]

    def _at_least_of_batches(self, regions: Regions, phases: PhaseTerms, batches: Floats, requests: int) -> PhaseTerms:
        """The terms' shares of a request, but no less than so many batches take.

        All but the last of them are at least as large as the smallest corner.
        """
        one = np.ones(len(regions))
        full = self._phase_terms(regions, regions.low[SIZE], regions.low[NUMBER])
        last = self._phase_terms(_with_last_batches(regions), one, one, least_chunks=1)
        found: PhaseTerms = []
        for (weights, terms), (_, of_full), (_, of_last) in zip(phases, full, last, strict=True):
            of_batches = ((batches - 1) * of_full + of_last) / requests
            found.append((weights, np.maximum(terms, of_batches)))
        return found

    def _phase_terms(self, regions: Regions, size: Floats, number: Floats, *, least_chunks: int = 2) -> PhaseTerms:
        """Weights of the phases, each with its terms' least seconds over cache and residents.

        Where prompts are not all prefilled at once, there are at least so many chunks.
        """
        spec = self.spec
        splits_kv = regions.low[KV] < regions.high[KV]
        splits_residents = (regions.gpu_ffn == 0) & (regions.low[RESIDENT] < regions.high[RESIDENT])
        corners = (1 + splits_kv) * (1 + splits_residents)
        of = np.repeat(np.arange(len(regions)), corners)
        first = np.cumsum(corners) - corners
        corner = np.arange(len(of)) - first[of]

        def every(values: Floats) -> Floats:
            return values[of]

        kv = np.where(splits_kv[of] & (corner % 2 == 1), every(regions.low[KV]), every(regions.high[KV]))
        at_low = splits_residents[of] & (corner > splits_kv[of])
        resident = np.where(at_low, every(regions.low[RESIDENT]), every(regions.high[RESIDENT]))
        resident = np.clip(resident, 0.0, spec.num_experts)
        # The fewest layers that can hold what is not resident.
        on_host = (spec.num_experts - resident) / spec.num_experts * spec.num_expert_layers / spec.num_layers
        ffn, last = every(regions.gpu_ffn), int(spec.layers[-1].has_experts)
        # An expert of the last layer has the least to do in prefill. So it takes the host the least if that layer has
        # no residents, and the GPU if it has as many as may be.
        others = max(spec.num_expert_layers - last, 1)
        of_last = last * np.clip(resident * spec.num_expert_layers - others * spec.num_experts, 0.0, spec.num_experts)
        point = Point(
            batch_size=every(size * number),
            num_micro_batches=every(number),
            lookahead=every(lookahead(regions.high[NUMBER])),
            num_weight_pages=every(number),
            gpu_attention=every(regions.gpu_attention),
            gpu_ffn=ffn,
            gpu_prefill_ffn=every(regions.gpu_prefill),
            gpu_kv_micro_batches=kv * every(number),
            resident_experts=resident,
            host_expert_layers=on_host,
            last_on_host=np.minimum(last * (spec.num_experts - of_last) / spec.num_experts, _NEARLY),
            last_residents=of_last,
            fewer_residents=last * (spec.num_experts - of_last) / others,
            resident_dense=every(regions.dense),
            chunk_tokens=every(self._longest_chunk(regions, size * number, least_chunks)),
            staging=int(self.space.staging),
            experts_per_part=self.space.experts_per_part,
            parts_of_chunks=True,
        )
        all_terms = self.space.schedule in _ALL_TERMS
        schedule = self.space.schedule if all_terms else ScheduleName.CGOPIPE
        found = [
            (weights, np.minimum.reduceat(stacked(terms, (len(weights), len(of))), first, axis=-1))
            for weights, terms in batch_terms(self.costs, point, schedule, self.space.workload)
        ]
        # Of many chunks so many are under way with the CPU's experts that their chain says no more than the lanes do.
        found[0][1][CHAIN] *= np.maximum(regions.gpu_prefill, regions.one_chunk)
        if self.space.experts_per_part:
            found[1][1][_ALONE] *= regions.high[NUMBER] <= 1
        return found

    def _longest_chunk(self, regions: Regions, batch: Floats, least_chunks: int) -> Floats:
        """Tokens that are prefilled at once: all prompts, or their part if there are several chunks."""
        prompts = batch * self.space.workload.prompt_len
        several = np.maximum(np.minimum(regions.high[CHUNK], prompts / least_chunks), 1e-3)
        return np.where(regions.one_chunk == 1, prompts, several)

    def cannot_halve(self, regions: Regions) -> NDArray[np.bool_]:
        """Regions of a single policy, as good as."""
        return self._widths(regions).max(axis=0) < 1e-4

    def _widths(self, regions: Regions) -> Floats:
        """How far each side of a region is worth halving."""
        low, high = np.maximum(regions.low, 1e-9), np.maximum(regions.high, 1e-9)
        widths = np.log(high / low)
        widths[CHUNK] *= 0.05 * (regions.one_chunk == 0)  # prefill hardly changes with its chunks
        widths[KV] = regions.high[KV] - regions.low[KV]
        shares = (regions.high[RESIDENT] - regions.low[RESIDENT]) / self.spec.num_experts
        widths[RESIDENT] = np.where(regions.gpu_ffn == 0, 2 * shares, 0.0)
        return widths

    def divided(self, regions: Regions) -> Regions:
        """The regions halved, and again as long as they are few: `AT_ONCE` take hardly longer to look at than one."""
        halves = self.halved(regions)
        while len(halves) < AT_ONCE and (wide := ~self.cannot_halve(halves)).any():
            halves = halves.take(~wide).and_also(self.halved(halves.take(wide)))
        return halves

    def halved(self, regions: Regions) -> Regions:
        """Two regions for each, cut along the side that is widest."""
        side = self._widths(regions).argmax(axis=0)
        index = np.arange(len(regions))
        low, high = regions.low[side, index], regions.high[side, index]
        geometric = np.sqrt(np.maximum(low, 1e-9) * high)
        cut = np.where((side == KV) | (side == RESIDENT), (low + high) / 2, geometric)
        whole = (side == SIZE) | (side == NUMBER)
        cut = np.where(whole, np.clip(np.floor(cut), low, high - 1), cut)
        lower, upper = regions.high.copy(), regions.low.copy()
        lower[side, index], upper[side, index] = cut, np.where(whole, cut + 1, cut)
        return replace(regions, high=lower).and_also(replace(regions, low=upper))


def _splits_cache(regions: Regions) -> NDArray[np.bool_]:
    """Where a smaller batch may have a larger share of its caches on the GPU than any whole one."""
    return (regions.high[KV] > 0) & (regions.high[KV] < 1)


def _with_last_batches(regions: Regions) -> Regions:
    """The regions with the last batches of their jobs: shares of the cache reach up to all of it."""
    high = regions.high.copy()
    high[KV] = np.where(_splits_cache(regions), 1.0, high[KV])
    return replace(regions, high=high)
