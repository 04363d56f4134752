"""How far searches are from the best of their whole space, over many random problems.

`make bench BENCH_ARGS="-k search_optimality"`; what contradicts a search's own words fails.
"""

import os
import statistics
import time
from random import Random

from hrm.estimate import estimate
from hrm.search import Outcome, Space, search
from hrm.search.result import OPTIMAL_GAP
from tests.bench.machine import circumstances
from tests.hrm.random_plans import random_case, random_policies

SEARCHES = int(os.environ.get("SEARCHES", "1500"))
POLICIES = 10


def test_random_searches():
    """Each against its bound, and against random policies, many of them close to its own."""
    gaps: list[float] = []
    seconds: list[tuple[float, str]] = []
    better: list[float] = []
    infeasible = optimal = tried = 0
    for seed in range(100_000, 100_000 + SEARCHES):
        rng = Random(seed)
        case = random_case(rng)
        started_s = time.process_time()
        result = search(Space(case.spec, case.profile, case.workload, dtype=case.dtype))
        seconds.append((time.process_time() - started_s, f"seed {seed}: {case}"))
        best = result.best
        assert (result.outcome is Outcome.OPTIMAL) == (best is not None and result.gap <= OPTIMAL_GAP)
        for policy in random_policies(rng, case, best and best.policy, count=POLICIES):
            assert best is not None, f"seed {seed}: {case}: {policy} fits"
            rate = estimate(case.spec, policy, case.profile, case.workload).tokens_per_s
            assert rate <= result.bound_tokens_per_s * (1 + 1e-9), f"seed {seed}: {case}: {policy}"
            better.append(rate / best.tokens_per_s - 1)
            tried += 1
        if best is None:
            infeasible += 1
            continue
        gaps.append(result.gap)
        optimal += result.outcome is Outcome.OPTIMAL
    gaps.sort()
    seconds.sort(reverse=True)
    print(f"\n{circumstances()}\n{SEARCHES} searches, {infeasible} of them of what cannot fit")
    print(
        f"gap: median {statistics.median(gaps):.2%}, nine of ten at most "
        f"{gaps[len(gaps) * 9 // 10]:.2%}, greatest {gaps[-1]:.1%}; {optimal} called optimal"
    )
    print(
        f"{tried} random policies: none above its bound; {sum(x > 0.002 for x in better)} more "
        f"than 0.2 % better than what was found, the best of them {max(better):.1%}"
    )
    median_s = statistics.median(one for one, _ in seconds)
    print(f"processor time a search: median {median_s:.2f} s; slowest:")
    for one, what in seconds[:5]:
        print(f"  {one:.2f} s  {what}")
