"""How far searches are from the best of their whole space, over many random problems.

`make bench BENCH_ARGS="-k search_optimality"`; what contradicts a search's own words fails.
"""

import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from random import Random

from hrm.estimate import estimate
from hrm.search import Outcome, Space, search
from hrm.search.result import OPTIMAL_GAP
from tests.bench.machine import circumstances
from tests.hrm.random_plans import random_case, random_policies

SEARCHES = int(os.environ.get("SEARCHES", "1500"))
POLICIES = 10
FIRST_SEED = 100_000


@dataclass(frozen=True, slots=True)
class Searched:
    """What came of one search: its gap, None where nothing fits, and how much better random policies are."""

    what: str
    seconds: float
    gap: float | None
    is_optimal: bool
    better: list[float]


def test_random_searches():
    """Each against its bound, and against random policies, many of them close to its own."""
    with ProcessPoolExecutor() as pool:
        searched = list(pool.map(searched_with, range(FIRST_SEED, FIRST_SEED + SEARCHES), chunksize=5))
    optimal = sum(one.is_optimal for one in searched)
    gaps = sorted(one.gap for one in searched if one.gap is not None)
    better = [share for one in searched for share in one.better]
    print(f"\n{circumstances()}\n{SEARCHES} searches, {SEARCHES - len(gaps)} of them of what cannot fit")
    print(
        f"gap: median {statistics.median(gaps):.2%}, nine of ten at most "
        f"{gaps[len(gaps) * 9 // 10]:.2%}, greatest {gaps[-1]:.1%}; {optimal} called optimal"
    )
    print(
        f"{len(better)} random policies: none above its bound; {sum(x > 0.002 for x in better)} more "
        f"than 0.2 % better than what was found, the best of them {max(better):.1%}"
    )
    in_order = sorted(searched, key=lambda one: -one.seconds)
    print(f"processor time a search: median {statistics.median(one.seconds for one in searched):.2f} s; slowest:")
    for one in in_order[:5]:
        print(f"  {one.seconds:.2f} s  {one.what}")


def searched_with(seed: int) -> Searched:
    """The search of a random problem, held against its bound and against random policies."""
    rng = Random(seed)
    case = random_case(rng)
    what = f"seed {seed}: {case}"
    started_s = time.process_time()
    result = search(Space(case.spec, case.profile, case.workload, dtype=case.dtype))
    seconds, best = time.process_time() - started_s, result.best
    is_optimal = result.outcome is Outcome.OPTIMAL
    assert is_optimal == (best is not None and result.gap <= OPTIMAL_GAP)
    better: list[float] = []
    for policy in random_policies(rng, case, best and best.policy, count=POLICIES, fewer_gpus=True):
        assert best is not None, f"{what}: {policy} fits"
        rate = estimate(case.spec, policy, case.profile, case.workload).tokens_per_s
        assert rate <= result.bound_tokens_per_s * (1 + 1e-9), f"{what}: {policy}"
        better.append(rate / best.tokens_per_s - 1)
    return Searched(what, seconds, None if best is None else result.gap, is_optimal, better)
