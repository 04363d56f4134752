"""What a search says of itself, held against random policies of its whole space."""

from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter
from random import Random
from typing import Any

import numpy as np
import pytest

from hrm.analysis import fronts
from hrm.analysis.fronts import front_of_cpu_memory
from hrm.estimate import estimate
from hrm.hardware import HardwareProfile
from hrm.latency import NO_LIMITS, LatencyLimits
from hrm.machines import compose, with_memory
from hrm.memory import plan_memory
from hrm.model_spec import BUILT_IN_MODELS
from hrm.placement import experts_of_layers
from hrm.policy import Policy, ScheduleName
from hrm.scaling import Resource, at_cost, resources, with_resource
from hrm.search import Outcome, SearchResult, Space, search, solver_named
from hrm.search.at_once import bound_at_once
from hrm.search.bound import Bounder, Bounding
from hrm.search.regions import Regions
from hrm.search.result import OPTIMAL_GAP
from hrm.search.smooth import smoothed
from hrm.tasks import Device
from hrm.units import GB
from hrm.workload import WORKLOADS, Workload
from tests.contracts.selection import chosen
from tests.hrm.ceilings import by_parts, closed_form_rate, lowest_ceilings
from tests.hrm.random_plans import Case, random_case, random_policies
from tests.hrm.support import machine, rate

pytestmark = pytest.mark.usefixtures("searches_kept")

GROUPS, A_GROUP = 10, 30  # of random problems
SEARCHED = 10  # one of so many
# Of random problems after the 9000th some that policies fit, of one GPU to eight, with gaps of less than a tenth.
FITTING = (4, 7, 9, 11, 15, 17, 21, 23, 25, 28)


def searched(case: Case, profile: HardwareProfile | None = None, **options: Any) -> SearchResult:
    machine = profile or case.profile
    return search(Space(case.spec, machine, case.workload, dtype=case.dtype, **options), runner_ups=0)


@pytest.mark.parametrize("group", range(GROUPS))
def test_no_policy_that_fits_is_cut_off_or_beats_a_ceiling_on_the_way_to_it(group):
    """The bounds of 300 random problems, at every region that a policy of theirs is in."""
    found = 0
    for seed in range(group * A_GROUP, (group + 1) * A_GROUP):
        rng = Random(seed)
        case = random_case(rng)
        space = Space(case.spec, case.profile, case.workload, dtype=case.dtype)
        for part, policies in by_parts(space, random_policies(rng, case, None, count=2)):
            for policy, ceiling in zip(policies, lowest_ceilings(part, policies), strict=True):
                rate = closed_form_rate(part, policy)
                assert rate <= ceiling * (1 + 1e-9), f"seed {seed}: {case}: {policy}"
                found += 1
    assert found > A_GROUP // 2  # not all of the machines drawn hold two layers of the models drawn


@pytest.mark.slow
@pytest.mark.usefixtures("quick_bounds")
@pytest.mark.parametrize("group", chosen(range(GROUPS // 2), at=(2,)))
def test_no_policy_that_fits_beats_the_bound_nor_a_search_that_is_called_optimal(group):
    """Of what is searched whole; `tests/bench/test_search_optimality.py` does it 1,500 times."""
    found = 0
    for seed in range(2 * group * A_GROUP, 2 * (group + 1) * A_GROUP, SEARCHED):
        rng = Random(seed)
        case = random_case(rng)
        result = searched(case)
        assert (result.outcome is Outcome.OPTIMAL) == (result.best is not None and result.gap <= OPTIMAL_GAP)
        best = None if result.best is None else result.best.policy
        for policy in random_policies(rng, case, best, count=4, fewer_gpus=True):
            assert result.best is not None, f"seed {seed}: {case}: {policy} fits"
            rate = estimate(case.spec, policy, case.profile, case.workload).tokens_per_s
            assert rate <= result.bound_tokens_per_s * (1 + 1e-9), f"seed {seed}: {case}: {policy}"
            found += 1
    assert found > 2


@pytest.mark.usefixtures("quick_bounds")
@pytest.mark.parametrize("seed", chosen(FITTING, at=(0, 3, 6)))
def test_more_of_a_resource_never_gives_less_and_a_narrower_search_never_more(seed):
    rng = Random(9000 + seed)
    case = random_case(rng)
    result = searched(case)
    best = result.require().tokens_per_s
    more = searched(case, at_cost(case.profile, rng.choice(resources(case.profile)), 1 / 1.3))
    device = rng.choice(list(Device))
    narrower = searched(case, attention=device) if seed % 2 else searched(case, ffn=device)
    assert more.bound_tokens_per_s >= best * (1 - 1e-9)
    assert more.require().tokens_per_s >= best * (1 - max(more.gap, OPTIMAL_GAP))
    if narrower.best is not None:
        assert narrower.best.tokens_per_s <= result.bound_tokens_per_s * (1 + 1e-9)
        assert narrower.best.tokens_per_s <= best / (1 - max(result.gap, OPTIMAL_GAP))


@pytest.mark.usefixtures("quick_bounds")
@pytest.mark.parametrize("seed", chosen(FITTING[:6], at=(0, 3)))
def test_what_is_nearly_as_good_being_known_keeps_no_search_from_the_best(seed):
    """Kinds and ways that a bound leaves out are none that have it."""
    case = random_case(Random(9000 + seed))
    best = searched(case).require()
    for limits in (NO_LIMITS, LatencyLimits(max_ttft_s=1e9)):
        again = searched(case, known_tokens_per_s=0.98 * best.tokens_per_s, limits=limits).require()
        assert again.tokens_per_s == pytest.approx(best.tokens_per_s, rel=2e-3)


@pytest.mark.parametrize("seed", FITTING[:4])
def test_a_bound_that_goes_on_is_one_and_as_good_as_from_the_start(seed):
    rng = Random(9000 + seed)
    case = random_case(rng)
    space = Space(case.spec, case.profile, case.workload, dtype=case.dtype)
    [(part, policies), *_] = by_parts(space, random_policies(rng, case, None, count=8))
    best = max(closed_form_rate(part, policy) for policy in policies)
    bounding = Bounding(part)
    first = bounding.go_on(0.5 * best, 1000)
    again = bounding.go_on(0.9 * best, 8000)
    afresh = Bounding(part).go_on(0.9 * best, 8000)
    assert best <= again.tokens_per_s <= first.tokens_per_s
    assert again.tokens_per_s <= afresh.tokens_per_s * 1.01
    assert again.regions <= first.regions + afresh.regions
    assert bounding.go_on(0.0, 1000) == Bounding(part).go_on(0.0, 1000)  # what was settled may hold the best


@pytest.mark.parametrize(("prompt_len", "chunk_tokens"), [(4000, 100_000), (16, 500)])
@pytest.mark.parametrize("on_gpu", [1, 4])
def test_the_ceiling_of_a_policy_holds_whatever_its_last_batch_is(on_gpu, prompt_len, chunk_tokens):
    """Of fewer requests, more of the cache is on the GPU, and all may be prefilled in one chunk.

    All weights are on the GPU and the cache crosses the link: what a batch costs is what it streams.
    """
    spec, profile = BUILT_IN_MODELS["olmoe-1b-7b"], compose("1xH100")
    policy = Policy(
        batch_size=48,
        micro_batch_size=8,
        attention=Device.GPU,
        resident_experts=experts_of_layers(spec),
        gpu_kv_micro_batches=on_gpu,
        kv_tokens_per_micro_batch=34_000,
        prefill_chunk_tokens=chunk_tokens,
    )
    at = np.array([[8.0], [6.0], [on_gpu / 6], [spec.num_experts], [chunk_tokens]])
    one = np.ones(1)
    region = Regions(gpu_attention=one, gpu_ffn=one, gpu_prefill=one, dense=one, one_chunk=0 * one, low=at, high=at)
    for requests in range(48, 150, 9):
        workload = Workload(
            name="given", prompt_len=prompt_len, max_prompt_len=prompt_len, gen_len=64, num_requests=requests
        )
        space = Space(spec=spec, profile=profile, workload=workload, dtype=policy.dtype, schedule=ScheduleName.CGOPIPE)
        left, ceilings = Bounder(space).bounded(region)
        assert len(left) == 1, "it fits"
        predicted = estimate(spec, policy, profile, workload)
        assert predicted.tokens_per_s <= ceilings[0] * (1 + 1e-9), requests
        assert predicted.bound_tokens_per_s >= 0.5 * ceilings[0], "a ceiling that is near"


def of_one_micro_batch(requests: int, residents: Sequence[int], *, chunk_tokens: int, **options: Any) -> Policy:
    """All on the GPU but for the experts that are not resident, which the CPU computes."""
    return Policy(
        batch_size=requests,
        micro_batch_size=requests,
        attention=Device.GPU,
        ffn=Device.CPU,
        prefill_ffn=Device.CPU,
        resident_experts=tuple(residents),
        gpu_kv_micro_batches=1,
        kv_tokens_per_micro_batch=320,
        prefill_chunk_tokens=chunk_tokens,
        **options,
    )


def test_residents_may_be_anywhere_but_in_the_last_layer():
    """There an expert has the least to do in prefill: a bound that took them to be spread evenly was too low."""
    case = random_case(Random(100_044))
    spec, layers = case.spec, case.spec.num_layers
    for whole, of_last in ((9, 0), (8, spec.num_experts)):
        residents = [38, *([spec.num_experts] * whole), *([0] * (layers - whole - 2)), of_last]
        policy = of_one_micro_batch(1, residents, chunk_tokens=300, dtype=case.dtype)
        predicted = estimate(spec, policy, case.profile, case.workload)
        space = Space(spec, case.profile, case.workload, dtype=case.dtype, attention=Device.GPU, ffn=Device.CPU)
        space = replace(space, prefill_ffn=Device.CPU)
        at = np.array([[1.0], [1.0], [1.0], [sum(residents) / layers], [300.0]])
        one = np.ones(1)
        region = Regions(
            gpu_attention=one, gpu_ffn=0 * one, gpu_prefill=0 * one, dense=one, one_chunk=one, low=at, high=at
        )
        left, ceilings = Bounder(space).bounded(region)
        assert len(left) == 1, "it fits"
        assert predicted.tokens_per_s <= ceilings[0] * (1 + 1e-9)


@pytest.mark.parametrize("model", ["olmoe-1b-7b", "mixtral-8x7b", "llama-4-scout"])
def test_residents_may_be_all_of_some_layers_experts_and_none_of_the_others(model):
    """Layers without any launch nothing for them: a bound by the mean over layers was 0.1 to 0.9 % too low."""
    spec, profile = BUILT_IN_MODELS[model], compose("1xMI300X")
    workload = Workload(name="short", prompt_len=2, max_prompt_len=2, gen_len=1, num_requests=2)
    for whole in (spec.num_layers // 4, spec.num_layers // 2, spec.num_layers - 4):
        residents = [*([spec.num_experts] * whole), *([0] * (spec.num_layers - whole))]
        policy = of_one_micro_batch(2, residents, chunk_tokens=4)
        predicted = estimate(spec, policy, profile, workload).tokens_per_s
        [ceiling] = lowest_ceilings(Space(spec, profile, workload), [policy])
        assert 0.98 * ceiling <= predicted <= ceiling * (1 + 1e-9)


@pytest.mark.parametrize("seed", [100_044, 101_115, 101_280])
def test_what_is_found_is_no_better_with_its_residents_in_whole_layers(seed):
    """Where the CPU computes the others, few layers with some of them cost less than all with a few."""
    case = random_case(Random(seed))
    best = searched(case).require()
    spec, total = best.part.spec, sum(best.policy.resident_experts)
    whole, rest = divmod(total, spec.num_experts)
    having = [spec.num_experts] * whole + [rest] * (rest > 0)
    residents = (*having, *[0] * (spec.num_layers - len(having)))
    policy = replace(best.policy, resident_experts=residents)
    assert plan_memory(case.spec, policy, case.profile).fits
    again = estimate(case.spec, policy, case.profile, case.workload)
    assert again.tokens_per_s <= best.tokens_per_s * 1.002


@pytest.mark.parametrize(
    ("seed", "least"),
    [
        (100_151, 0.779),  # 0.773 with the only prompt in one piece
        (100_486, 172.0),  # 166.9 with chunks that were too long for larger batches
        (100_788, 75.5),  # 72.5 with all projections on the GPU
        (400_356, 5.55),  # 5.41 with none there either, as means have whole layers slower than they are
        (300_098, 8.16),  # 7.16 with no expert on the GPU, as few in every layer are worse
        (100_768, 206.4),  # 206.0 where policies that may be called optimal were not changed
        (101_381, 0.549),  # 0.5479 likewise
        (101_126, 17.52),  # 17.48 with residents in whole layers of which the first is one
        (101_399, 370.4),  # 369.6 with projections only where the best policy had them, and no size one larger
    ],
)
def test_the_last_step_finds_what_was_missed(seed, least):
    assert searched(random_case(Random(seed))).require().tokens_per_s > least


def test_a_host_smaller_than_the_model_is_searched_whole():
    """All of it fits the GPUs: this once gave 213.6 tokens/s, called optimal."""
    profile = with_memory(compose("2xA100-80G"), cpu_memory_bytes=64 * GB)
    spec = BUILT_IN_MODELS["mixtral-8x7b"]
    space = Space(spec, profile, WORKLOADS["mtbench"])
    on_gpu = replace(space, attention=Device.GPU, ffn=Device.GPU)  # all programs take a quarter of a minute
    for searched_space, solver, least in ((space, "exhaustive", 8400), (on_gpu, "milp", 8200)):
        result = search(searched_space, solver_named(solver))
        assert result.require().tokens_per_s > least
        assert result.bound_tokens_per_s < 8900


@pytest.mark.usefixtures("quick_bounds")
def test_experts_fixed_to_the_gpu_lose_nothing_where_they_are_best_there():
    spec, profile = BUILT_IN_MODELS["gpt-oss-20b"], compose("8xH100")
    free = search(Space(spec, profile, WORKLOADS["mtbench"])).require().tokens_per_s
    fixed = search(Space(spec, profile, WORKLOADS["mtbench"], ffn=Device.GPU)).require().tokens_per_s
    assert fixed == pytest.approx(free, rel=OPTIMAL_GAP)


def test_short_prompts_are_prefilled_in_chunks_of_many():
    """A chunk was at most sixteen of the longest prompt, however short that is."""
    spec, profile = BUILT_IN_MODELS["qwen3-30b-a3b"], compose("1xRTX-4090")
    workload = Workload(name="short", prompt_len=4, max_prompt_len=4, gen_len=2)
    policy = search(Space(spec, profile, workload)).require().policy
    assert policy.prefill_chunk_tokens > 1000


@pytest.mark.usefixtures("quick_bounds")
def test_a_front_begins_where_a_search_of_its_first_point_does(monkeypatch):
    monkeypatch.setattr(fronts, "POINTS", 5)
    spec, profile = BUILT_IN_MODELS["mixtral-8x7b"], compose("1xL4")
    space = Space(spec, profile, WORKLOADS["mtbench"], dtype="float16", attention=Device.CPU, ffn=Device.GPU)
    front = front_of_cpu_memory(space)
    front = front[front["tokens_per_s"].notna()]
    first = front.iloc[0]
    least = with_resource(profile, Resource.CPU_MEMORY, int(first["cpu_memory_bytes"]))
    alone = search(replace(space, profile=least))
    assert first["tokens_per_s"] >= alone.require().tokens_per_s * (1 - OPTIMAL_GAP)
    rates = front["tokens_per_s"].to_numpy()
    assert (rates[1:] >= rates[:-1] * (1 - OPTIMAL_GAP)).all()


def test_a_smooth_machine_is_nowhere_slower_and_work_takes_longer_the_more_it_is():
    """A curve that falls, and one that rises faster than the size."""
    profile = machine()
    top = profile.top
    curve = ((1.0, 1e12), (2.0, 9e12), (64.0, 5e12), (4096.0, 4e13))
    processor = replace(top.processor, compute_flops_per_s={"bfloat16": rate(4e13, curve)})
    profile = replace(profile, levels=(replace(top, processor=processor), profile.host))
    sizes = np.geomspace(0.5, 10_000, 4001)
    before = np.asarray(profile.top.processor.flops_per_s("bfloat16", sizes))
    after = np.asarray(smoothed(profile).top.processor.flops_per_s("bfloat16", sizes))
    assert (after >= before).all()
    assert (np.diff(after) >= 0).all()
    assert (np.diff(sizes / after) >= -1e-3 * (sizes / after)[1:]).all()


def test_no_policy_with_experts_in_parts_beats_a_ceiling_on_the_way_to_it():
    found = 0
    for seed in range(14):
        rng = Random(seed)
        case = random_case(rng)
        per_part = rng.choice([1, 1, 2, max(1, case.spec.num_experts // 3)])
        space = Space(case.spec, case.profile, case.workload, dtype=case.dtype, prefill_ffn=Device.GPU)
        if not case.profile.has_accelerator:
            continue
        in_parts = [
            replace(policy, experts_per_part=per_part)
            for policy in random_policies(rng, case, None, count=8)
            if policy.prefill_ffn is Device.GPU
        ]
        fitting = [policy for policy in in_parts if plan_memory(case.spec, policy, case.profile).fits]
        for part, policies in by_parts(space, fitting):
            for policy, ceiling in zip(policies, lowest_ceilings(part, policies), strict=True):
                assert closed_form_rate(part, policy) <= ceiling * (1 + 1e-9), f"seed {seed}: {case}: {policy}"
        found += len(fitting)
    assert found > 25


@pytest.mark.parametrize("seed", range(500_000, 500_012))
def test_no_way_of_sharing_gpus_exceeds_one_that_does_all_at_once(seed):
    rng = Random(seed)
    case = next(case for case in iter(lambda: random_case(rng), None) if case.profile.num_gpus > 1)
    whole = Space(case.spec, case.profile, case.workload, dtype=case.dtype)
    tried = [(policy, whole.predicted(policy).tokens_per_s) for policy in random_policies(rng, case, None, count=4)]
    best, tokens_per_s = max(tried, key=itemgetter(1), default=(None, 0.0))
    found = best and whole.predicted(best)
    assert bound_at_once(whole, found, tokens_per_s).tokens_per_s >= tokens_per_s
