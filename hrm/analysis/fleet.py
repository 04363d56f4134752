"""A job shared out over machines of several kinds: how fast they are together, and each kind's share."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, fsum
from typing import TYPE_CHECKING, Any, Final

from hrm.analysis.machines import row_by_gpus
from hrm.analysis.rows import OnPoint, table
from hrm.errors import WorkloadError
from hrm.search import SearchResult, Space, search

if TYPE_CHECKING:
    import pandas as pd

MOST_TURNS: Final = 5  # of searches for shares: how fast a machine is depends on its own share
COLUMNS: Final = (
    "kind",
    "count",
    "machine",
    "dtype",
    "share",
    "num_requests",
    "tokens_per_s_of_all",
    "tokens_per_price",
)
_S_PER_HOUR: Final = 3600


@dataclass(frozen=True, slots=True)
class MachineKind:
    """So many machines that are alike, what is searched on each, and what one costs an hour."""

    name: str
    count: int
    space: Space
    price_per_hour: float | None = None


@dataclass(frozen=True, slots=True)
class Fleet:
    """What all machines do together, and a row for every kind of them.

    `seconds` is when the last machine ends, None for a job without end. `tokens_per_price` are
    tokens for one unit of what prices are in, None where a price is not known. Rows have `COLUMNS`
    and those of `search_row`: `share` is a kind's part of the job, and `num_requests` is what one
    machine of it gets.
    """

    rows: "pd.DataFrame"
    num_machines: int
    tokens_per_s: float
    seconds: float | None
    price_per_hour: float | None
    tokens_per_price: float | None

    @property
    def price(self) -> float | None:
        """What the whole job costs; None if that is not known, or it has no end."""
        if self.seconds is None or self.price_per_hour is None:
            return None
        return self.price_per_hour * self.seconds / _S_PER_HOUR


@dataclass(frozen=True, slots=True)
class _Turn:
    """What was found for every kind with so many requests for each machine of it."""

    requests: list[int | None]
    results: list[SearchResult]

    @property
    def rates(self) -> list[float]:
        """Tokens/s of one machine; 0 where nothing fits."""
        return [0.0 if result.best is None else result.best.tokens_per_s for result in self.results]

    @property
    def seconds(self) -> float:
        """When the last machine ends."""
        return max(result.best.seconds for result in self.results if result.best is not None)


def plan_fleet(kinds: Sequence[MachineKind], *, on_point: OnPoint = None) -> Fleet:
    """Share a job out over the kinds, whose spaces have the same workload, so that all end together.

    Shares are in proportion to throughput. Of a job that ends, that is what a machine reaches with
    its own share: shares and policies are found in turns, and those are kept that end first. A kind
    on which nothing fits gets no share. Raises PolicyError if nothing fits on any, and
    WorkloadError if there are fewer requests than machines.
    """
    num_machines, requests = sum(kind.count for kind in kinds), kinds[0].space.workload.num_requests
    if requests is not None and requests < num_machines:
        rule = f"must be at least one for each of the fleet's {num_machines} machines"
        raise WorkloadError("--requests", requests, rule, "name fewer machines")
    turn = best = _searched(kinds, [None] * len(kinds), None, on_point)
    if all(result.best is None for result in turn.results):
        turn.results[0].require()
    tried: list[_Turn] = []
    while requests is not None and len(tried) < MOST_TURNS:
        whole = _together(kinds, turn.rates)
        shared: list[int | None] = [ceil(requests * rate / whole) for rate in turn.rates]
        if any(shared == earlier.requests for earlier in tried):
            break
        turn = _searched(kinds, shared, turn, on_point)
        tried.append(turn)
        best = min(tried, key=lambda one: one.seconds)
    return _fleet(kinds, best)


def _searched(
    kinds: Sequence[MachineKind], requests: list[int | None], before: _Turn | None, on_point: OnPoint
) -> _Turn:
    """A search for every kind, but for those that get no requests as nothing fitted before."""
    results: list[SearchResult] = []
    for index, (kind, asked) in enumerate(zip(kinds, requests, strict=True)):
        if asked == 0:
            assert before is not None
            results.append(before.results[index])
            continue
        workload = replace(kind.space.workload, num_requests=asked)
        results.append(search(replace(kind.space, workload=workload)))
        if on_point is not None:
            on_point()
    return _Turn(requests, results)


def _together(kinds: Sequence[MachineKind], amounts: Sequence[float]) -> float:
    """What all machines make of an amount that one of each kind has."""
    return fsum(kind.count * amount for kind, amount in zip(kinds, amounts, strict=True))


def _fleet(kinds: Sequence[MachineKind], turn: _Turn) -> Fleet:
    workload, rates = kinds[0].space.workload, turn.rates
    tokens_per_s, seconds = _together(kinds, rates), None
    work: Sequence[float] = rates
    if workload.num_requests is not None:
        seconds, work = turn.seconds, [float(asked or 0) for asked in turn.requests]
        tokens_per_s = workload.num_requests * workload.generated_tokens / seconds
    rows: list[dict[str, Any]] = [
        {
            "kind": kind.name,
            "count": kind.count,
            "machine": kind.space.profile.name,
            "dtype": kind.space.dtype,
            "share": kind.count * part / _together(kinds, work),
            "num_requests": asked,
            "tokens_per_s_of_all": kind.count * rate,
            "tokens_per_price": _per_price(rate, kind.price_per_hour),
            **row_by_gpus(kind.space, result),
        }
        for kind, part, asked, rate, result in zip(kinds, work, turn.requests, rates, turn.results, strict=True)
    ]
    prices = [kind.price_per_hour for kind in kinds if kind.price_per_hour is not None]
    price = _together(kinds, prices) if len(prices) == len(kinds) else None
    return Fleet(
        table(rows, COLUMNS).astype({"num_requests": "Int64"}),
        sum(kind.count for kind in kinds),
        tokens_per_s,
        seconds,
        price,
        _per_price(tokens_per_s, price),
    )


def _per_price(tokens_per_s: float, price_per_hour: float | None) -> float | None:
    return None if price_per_hour is None else tokens_per_s * _S_PER_HOUR / price_per_hour
