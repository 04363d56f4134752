"""Pipelines of unequal GPUs: stages of their own lengths, planned, predicted and searched."""

import sys
from dataclasses import replace
from itertools import product
from random import Random

import pytest

from hrm.errors import PolicyError
from hrm.estimate import Estimate, estimate
from hrm.gpus import only_gpus
from hrm.hardware import GpuCard, HardwareProfile, Host, Link, LinkKind
from hrm.latency import Latency
from hrm.machines import assemble_all, compose
from hrm.memory import plan_memory
from hrm.model_spec import BUILT_IN_MODELS, ModelSpec
from hrm.parallel import shares_for, stage_of
from hrm.policy import Parallelism, Policy, kv_tokens_for, spread_experts
from hrm.policy_file import load_policy_file, policy_file_of, save_policy_file
from hrm.search import Space, search, way
from hrm.tasks import Device
from hrm.workload import WORKLOADS, Workload
from tests.contracts.selection import chosen
from tests.hrm.support import figure, level, rate, tiny_spec

WORKLOAD = Workload(name="test", prompt_len=40, max_prompt_len=60, gen_len=12)
SPEC = tiny_spec(num_layers=6, hidden_size=256, intermediate_size=512)


def link(source: str, target: str, bandwidth: float, kind: LinkKind = "pinned") -> Link:
    return Link(source=source, target=target, kind=kind, latency_s=figure(1e-5), bandwidth_bytes_per_s=rate(bandwidth))


def card(
    name: str, *, gpu_bytes: float = 12e6, flops: float = 2e12, read: float = 100e9, moves: float = 4e9
) -> GpuCard:
    return GpuCard(
        name=name,
        level=level("gpu", gpu_bytes, flops, read, 1e-6),
        h2d=link("cpu", "gpu", moves),
        d2h=link("gpu", "cpu", moves),
        peer=link("gpu", "gpu", 1e9, "peer"),
        default_host="none",
    )


def host(cpu_bytes: float = 200e6) -> Host:
    return Host(
        name="host",
        level=level("cpu", cpu_bytes, 1e11, 20e9, 1e-6),
        staging=link("cpu", "cpu", 10e9, "staging"),
        root_port_bytes_per_s=rate(1e12),
        max_gpus=8,
    )


def machine(*cards: GpuCard, cpu_bytes: float = 200e6) -> HardwareProfile:
    return assemble_all([(1, one) for one in cards], host(cpu_bytes))


def random_card(rng: Random, name: str) -> GpuCard:
    return card(
        name,
        gpu_bytes=rng.uniform(8e6, 30e6),
        flops=rng.uniform(0.2e12, 4e12),
        read=rng.uniform(30e9, 300e9),
        moves=rng.uniform(1e9, 12e9),
    )


def space(
    profile: HardwareProfile,
    way: Parallelism | None = None,
    spec: ModelSpec = SPEC,
    workload: Workload = WORKLOAD,
    *,
    quick: bool = False,
) -> Space:
    """What is searched, with few sizes of micro-batches.

    Of four places for attention and experts it is `quick` to search one, where nothing depends on these.
    """
    free = Space(spec, profile, workload, parallelism=way, max_micro_batch_size=512, max_micro_batches=16)
    return replace(free, attention=Device.CPU, ffn=Device.GPU) if quick else free


SLOW, FAST = card("slow"), card("fast", gpu_bytes=24e6, flops=6e12, read=300e9, moves=10e9)


def a_policy(spec: ModelSpec, lengths: tuple[int, ...], **changes: object) -> Policy:
    plain = Policy(
        batch_size=32,
        micro_batch_size=8,
        resident_experts=(1,) * spec.num_layers,
        kv_tokens_per_micro_batch=kv_tokens_for(8, WORKLOAD.mean_context_len, WORKLOAD.max_context_len),
        prefill_chunk_tokens=256,
        parallelism=Parallelism.PIPELINE,
        stage_lengths=lengths,
    )
    return replace(plain, **changes)


# ------------------------------------------------------------------------------------ the parts


def test_stages_have_their_own_layers_gpus_and_shares_of_the_host():
    profile = machine(FAST, SLOW)
    counts = (4, 3, 2, 1, 0, 4)
    fast, slow = shares_for(a_policy(SPEC, (4, 2), resident_experts=counts), SPEC, profile)
    assert (fast.policy.resident_experts, slow.policy.resident_experts) == (counts[:4], counts[4:])
    assert fast.part.spec.layers + slow.part.spec.layers == SPEC.layers
    assert [(one.part.spec.has_embedding, one.part.spec.has_head) for one in (fast, slow)] == [(1, 0), (0, 1)]
    for share, its, part in ((fast, FAST, 4 / 6), (slow, SLOW, 2 / 6)):
        assert share.part.profile.top == its.level
        assert (share.part.profile.num_gpus, share.part.profile.num_stages) == (1, 2)
        assert (share.part.profile.h2d, share.part.profile.d2h) == (its.h2d, its.d2h)
        assert share.part.profile.host.read_bytes_per_s.at() == pytest.approx(part * 20e9)
        assert share.part.profile.host.capacity_bytes.value == pytest.approx(part * 200e6)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"stage_lengths": (4, 1)}, "as many layers together as resident_experts"),
        ({"stage_lengths": (6, 0)}, "at least 1 each"),
        ({"parallelism": Parallelism.TENSOR}, "be those of a pipeline"),
        ({"stage_lengths": (2, 2, 2)}, "one length for each of the 2 GPUs"),
        ({"stage_lengths": (4, 3), "resident_experts": (1,) * 7}, "each of the 6 layers"),
        ({"resident_experts": (1, 1, 1, 1, 1, 9)}, "at most the 4 experts"),
    ],
)
def test_lengths_that_cannot_be_are_refused(changes, rule):
    with pytest.raises(PolicyError, match=rule):
        estimate(SPEC, a_policy(SPEC, (4, 2), **changes), machine(FAST, SLOW), WORKLOAD)


def test_a_stage_without_experts_is_refused():
    spec = tiny_spec(num_layers=6, num_dense_layers=2, dense_intermediate_size=100)
    with pytest.raises(PolicyError, match="a layer with experts"):
        estimate(spec, a_policy(spec, (2, 4), resident_experts=(0, 0, 1, 1, 1, 1)), machine(FAST, SLOW), WORKLOAD)


# -------------------------------------------------------------------------------- the prediction


@pytest.mark.parametrize(("requests", "rounds"), [(None, 1), (30, 2), (32, 2), (96, 6)])
def test_each_phase_takes_as_long_as_its_slowest_stage(requests, rounds):
    profile, workload = machine(FAST, SLOW), replace(WORKLOAD, num_requests=requests)
    policy = a_policy(SPEC, (4, 2), batch_size=16)
    whole = estimate(SPEC, policy, profile, workload)
    one_batch = replace(workload, num_requests=None)
    alone = []
    for share in shares_for(policy, SPEC, profile):
        own = replace(share.policy, parallelism=Parallelism.TENSOR)
        alone.append(estimate(share.part.spec, own, share.part.profile, one_batch))
    assert whole.prefill.seconds == pytest.approx(rounds * max(stage.prefill.seconds for stage in alone), rel=1e-9)
    assert whole.decode.seconds == pytest.approx(rounds * max(stage.decode.seconds for stage in alone), rel=1e-9)
    assert whole.bound_tokens_per_s >= whole.tokens_per_s
    slowest = max(alone, key=lambda stage: stage.seconds)
    assert whole.part.spec == slowest.part.spec
    assert whole.limits.job.cause is not None


def first_tokens_s(prefill_s: list[float]) -> float:
    """How long the last of as many batches as stages waits from its start, event by event."""
    free_s, waits_s = [0.0] * len(prefill_s), 0.0
    for _ in prefill_s:
        start_s = now_s = free_s[0]
        for stage, seconds in enumerate(prefill_s):
            now_s = free_s[stage] = max(now_s, free_s[stage]) + seconds
        waits_s = max(waits_s, now_s - start_s)
    return waits_s


@pytest.mark.parametrize("seed", range(10))
def test_first_tokens_come_when_the_last_batch_has_gone_through_all_stages(seed):
    rng = Random(seed)
    prefill_s = [rng.choice([1.0, rng.uniform(0.5, 3)]) for _ in range(rng.randint(1, 5))]
    count = len(prefill_s)
    latency = Latency.of_batch(
        prefill_s=prefill_s, num_stages=count, gpu_s_a_layer=0, chunks=1, decode_s=6, decode_steps=3
    )
    assert latency.last_ttft_s == latency.mean_ttft_s == pytest.approx(first_tokens_s(prefill_s))
    assert latency.tpot_s == 2 * count


def test_stages_that_do_the_same_are_worked_out_once_and_others_by_themselves(monkeypatch):
    estimates = sys.modules["hrm.estimate"]
    rng, profile, worked_out = Random(0), machine(*4 * (FAST,)), []
    run = estimates.StageRun
    monkeypatch.setattr(estimates, "StageRun", lambda *args: worked_out.append(args) or run(*args))
    once = 0
    for _ in range(12):
        layers = [*SPEC.layers, *SPEC.layers]
        layers.insert(rng.choice([0, 8]), SPEC.layers[0].with_window(16))
        spec = SPEC.with_layers(layers)
        lengths = rng.choice([(4, 3, 3, 3), (2, 4, 4, 3), (3, 3, 3, 4)])
        counts = rng.choice([(1,) * 13, tuple(rng.choices([1, 2], k=13))])
        policy = a_policy(spec, lengths, resident_experts=counts, batch_size=rng.choice([24, 32]))
        workload = replace(WORKLOAD, num_requests=rng.choice([None, 80]))
        worked_out.clear()
        together = estimate(spec, policy, profile, workload)
        once += 4 - len(worked_out)
        with monkeypatch.context() as patch:
            patch.setattr(estimates, "what_tells_apart", lambda _: object())
            assert together == estimate(spec, policy, profile, workload)
    assert 3 < once < 12 * 2


def test_no_gpu_holds_more_than_it_has_and_the_host_is_that_of_all():
    profile = machine(FAST, SLOW)
    fits = a_policy(SPEC, (4, 2))
    assert plan_memory(SPEC, fits, profile).fits
    predicted = estimate(SPEC, fits, profile, WORKLOAD)
    in_host = [plan_memory(*_alone(share)).cpu.planned_bytes for share in shares_for(fits, SPEC, profile)]
    assert predicted.memory.cpu.planned_bytes == sum(in_host)
    assert predicted.memory.cpu.capacity_bytes == profile.host.usable_bytes
    heavy = replace(fits, stage_lengths=(1, 5), resident_experts=(4,) * 6)
    plan = plan_memory(SPEC, heavy, profile)
    assert not plan.fits
    assert plan.gpu.capacity_bytes == SLOW.level.usable_bytes
    with pytest.raises(PolicyError, match=r"memory at level gpu.*--gpu-memory"):
        plan.check_fits()


def _alone(share):
    return share.part.spec, replace(share.policy, parallelism=Parallelism.TENSOR), share.part.profile


def test_a_policy_file_keeps_the_stages(tmp_path):
    profile, policy = machine(FAST, SLOW), a_policy(SPEC, (4, 2))
    content = policy_file_of(estimate(SPEC, policy, profile, WORKLOAD), SPEC, profile, WORKLOAD)
    save_policy_file(tmp_path / "policy.json", content)
    again = load_policy_file(tmp_path / "policy.json")
    assert again == content
    assert again.share.part.spec.num_layers in {4, 2}


# ------------------------------------------------------------------------------------ the search


def pipeline_of(
    spec: ModelSpec, profile: HardwareProfile, workload: Workload = WORKLOAD, *, quick: bool = False
) -> Estimate:
    return search(space(profile, Parallelism.PIPELINE, spec, workload, quick=quick)).require()


def test_what_is_found_fits_and_is_shared_out():
    rng, spec = Random(0), tiny_spec(num_layers=9, attention_windows=(16, 0, 0) * 3)
    profile = machine(*(random_card(rng, name) for name in "abc"))
    workload = replace(WORKLOAD, num_requests=50)
    best = pipeline_of(spec, profile, workload, quick=True)
    lengths, used = best.policy.stage_lengths, best.policy.gpus or range(3)
    assert (len(lengths), sum(lengths)) == (len(used), spec.num_layers)
    assert len(best.policy.resident_experts) == spec.num_layers
    for stage, gpu in zip(best.stages, used, strict=True):
        assert stage.memory.gpu.planned_bytes <= profile.gpus[gpu].level.usable_bytes
    assert best.memory.cpu.planned_bytes <= profile.host.usable_bytes
    assert estimate(spec, best.policy, profile, workload).tokens_per_s == best.tokens_per_s


def most_residents(spec: ModelSpec, profile: HardwareProfile, policy: Policy) -> Policy | None:
    """The policy with as many resident experts on each stage as fit, counted up one by one."""
    counts: list[int] = []
    for index, layers in enumerate(policy.stages):
        part = stage_of(spec, profile, index, layers)
        kept = None
        for total in range(0, 4 * part.spec.num_expert_layers + 1, 2):
            alone = replace(policy.of_stage(index), resident_experts=spread_experts(part.spec, total))
            plan = plan_memory(part.spec, replace(alone, parallelism=Parallelism.TENSOR), part.profile)
            if plan.gpu.planned_bytes <= plan.gpu.capacity_bytes:
                kept = alone.resident_experts
        if kept is None:
            return None
        counts += kept
    whole = replace(policy, resident_experts=tuple(counts))
    return whole if plan_memory(spec, whole, profile).fits else None


@pytest.mark.parametrize("seed", chosen(range(2), at=(0,)))
def test_no_other_lengths_are_better(seed):
    """Every way of sharing out the layers, under policies of all kinds: none beats the search by more than a hair."""
    rng = Random(f"brute {seed}")
    profile = machine(random_card(rng, "a"), random_card(rng, "b"), cpu_bytes=30e6)
    best = pipeline_of(SPEC, profile)
    rates = {}
    for first, size, number, attention, share in product(range(1, SPEC.num_layers), (8, 48), (1, 3), Device, (0, 1)):
        asked = a_policy(
            SPEC,
            (first, SPEC.num_layers - first),
            batch_size=size * number,
            micro_batch_size=size,
            attention=attention,
            gpu_kv_micro_batches=share * number,
            kv_tokens_per_micro_batch=kv_tokens_for(size, WORKLOAD.mean_context_len, WORKLOAD.max_context_len),
            prefill_chunk_tokens=max(60, size * number * 40 // 2),
        )
        if (policy := most_residents(SPEC, profile, asked)) is not None:
            rates[policy] = estimate(SPEC, policy, profile, WORKLOAD).tokens_per_s
    assert len(rates) > 20
    assert best.tokens_per_s >= 0.99 * max(rates.values()), max(rates, key=lambda policy: rates[policy])


def test_the_order_of_the_gpus_matters_for_the_ends_alone():
    """Which of the two hands hidden states on over its link, and which has the LM head."""
    one, other = (pipeline_of(SPEC, machine(*cards), quick=True) for cards in ((FAST, SLOW), (SLOW, FAST)))
    assert one.tokens_per_s == pytest.approx(other.tokens_per_s, rel=0.1)
    assert one.policy.stage_lengths == other.policy.stage_lengths[::-1]
    assert one.policy.stage_lengths[0] > one.policy.stage_lengths[1]


def test_every_stage_gets_a_layer_with_experts():
    spec = tiny_spec(num_layers=8, num_dense_layers=3, dense_intermediate_size=300)
    tiny = card("tiny", gpu_bytes=3e6, flops=1e11)
    best = pipeline_of(spec, machine(tiny, FAST), quick=True)
    assert best.policy.stage_lengths[0] > 3
    assert sum(best.policy.stage_lengths) == 8


def test_gpus_that_hardly_differ_are_like_equal_ones():
    nearly = replace(SLOW, name="nearly")
    unequal, equal = machine(SLOW, nearly), assemble_all([(2, SLOW)], host())
    assert (len(unequal.gpus), equal.gpus) == (2, ())
    for shared in Parallelism:
        rates = [search(space(one, shared, quick=True)).tokens_per_s for one in (unequal, equal)]
        # A stage that stands for all has the LM head, which takes less here than handing hidden states on.
        assert rates[0] == pytest.approx(rates[1], rel=5e-2)


def test_a_faster_gpu_is_worth_adding():
    rates = []
    for gpus in ("1xRTX-3090+1xRTX-4090", "1xRTX-3090"):
        profile = compose(gpus, "generic-server")
        rates.append(search(Space(BUILT_IN_MODELS["mixtral-8x7b"], profile, WORKLOADS["mtbench"])).tokens_per_s)
    assert rates[0] > 1.5 * rates[1]


# ----------------------------------------------------------------------------- some GPUs alone


def test_a_policy_of_some_gpus_is_that_of_the_machine_with_these():
    both = compose("1xL4+2xT4", "generic-server")
    pair, spec = compose("2xT4", "generic-server"), BUILT_IN_MODELS["mixtral-8x7b"]
    policy = replace(search(Space(spec, pair, WORKLOADS["mtbench"], dtype="float16")).require().policy, gpus=(1, 2))
    alone = replace(policy, gpus=())
    rates = [estimate(spec, one, where, WORKLOADS["mtbench"]) for one, where in ((policy, both), (alone, pair))]
    assert rates[0].tokens_per_s == pytest.approx(rates[1].tokens_per_s, rel=1e-9)
    assert rates[0].memory.gpu.planned_bytes == rates[1].memory.gpu.planned_bytes


@pytest.mark.parametrize("gpus", [(2,), (1, 0), (0, 0), (-1,)])
def test_gpus_that_a_machine_has_not_are_refused(gpus):
    policy = replace(a_policy(SPEC, ()), gpus=gpus, parallelism=Parallelism.TENSOR)
    with pytest.raises(PolicyError, match=r"gpus is .*must be numbers of GPUs, ascending"):
        plan_memory(SPEC, policy, machine(FAST, SLOW))
    with pytest.raises(PolicyError, match="has 2"):
        plan_memory(SPEC, policy, assemble_all([(2, SLOW)], host()))


def test_no_gpu_makes_a_machine_slower():
    one, other = random_card(Random(7), "one"), card("other", flops=5e12, gpu_bytes=20e6)
    both = search(space(machine(one, other), quick=True))
    alone = [search(space(machine(each), quick=True)).tokens_per_s for each in (one, other)]
    assert both.tokens_per_s >= 0.998 * max(alone)
    best = both.require()
    (chosen,) = (one.best for one in both.ways if one.is_of(best.policy))
    rates = [one.best.tokens_per_s for one in both.ways if one.best is not None]
    assert chosen is not None
    assert best.tokens_per_s == chosen.tokens_per_s >= 0.998 * max(rates)
    assert [one.gpus for one in both.ways][:3] == [(), (), ()]


def test_a_gpu_that_only_holds_up_the_others_is_left_out():
    profile = machine(FAST, card("old", flops=1e9, read=1e9, moves=1e8))
    best = search(space(profile, quick=True)).require()
    assert best.policy.gpus == (0,)
    assert estimate(SPEC, best.policy, profile, WORKLOAD).tokens_per_s == best.tokens_per_s


# --------------------------------------------------------------------------- GPUs that are alike


@pytest.mark.parametrize(
    ("model", "count", "gpu", "fewer"),
    [("dbrx", 3, "T4", 2), ("mixtral-8x22b", 3, "T4", 2), ("qwen3-30b-a3b", 5, "A100-80G", 4)],
)
def test_more_gpus_than_divide_a_model_give_no_less_than_those_that_do(model, count, gpu, fewer):
    spec, workload = BUILT_IN_MODELS[model], WORKLOADS["mtbench"]
    more, less = (search(Space(spec, compose(f"{number}x{gpu}"), workload)) for number in (count, fewer))
    assert more.tokens_per_s >= 0.998 * less.tokens_per_s
    assert more.bound_tokens_per_s >= less.tokens_per_s
    policy = more.require().policy
    assert policy.gpus == tuple(range(fewer))
    alone = estimate(spec, replace(policy, gpus=()), compose(f"{fewer}x{gpu}"), workload)
    assert more.tokens_per_s == pytest.approx(alone.tokens_per_s, rel=1e-3)  # links are limited as those of all are


@pytest.mark.parametrize("seed", range(4))
def test_no_number_of_equal_gpus_is_worse_than_a_smaller_one(seed):
    random = Random(seed)
    figures = {name: random.uniform(least, most) for name, least, most in (("moves", 2e8, 4e9), ("flops", 1e11, 1e13))}
    rates = [search(space(equal(count, **figures), quick=True)).tokens_per_s for count in (1, 2, 3)]
    assert rates == pytest.approx(sorted(rates), rel=2e-3)


@pytest.mark.parametrize(("gpus", "some"), [("3xT4", (0, 2)), ("8xH100", (0, 1, 2, 3)), ("8xH100", (5,))])
def test_fewer_equal_gpus_have_links_and_memory_of_so_many(gpus, some):
    count, name = gpus.split("x", 1)
    whole, less = compose(gpus), compose(f"{len(some)}x{name}")
    fewer = only_gpus(whole, some)
    assert fewer.num_gpus == len(some) < int(count)
    assert fewer.top.usable_bytes == pytest.approx(less.top.usable_bytes)
    assert fewer.h2d.bandwidth_bytes_per_s.at() == pytest.approx(less.h2d.bandwidth_bytes_per_s.at())
    assert fewer.host == less.host


def equal(count: int, cpu_bytes: float = 200e6, **of_card: float) -> HardwareProfile:
    return assemble_all([(count, card("one", **of_card))], host(cpu_bytes))


def test_stages_that_come_out_alike_are_planned_by_one():
    best = search(space(equal(2), Parallelism.PIPELINE))
    assert best.require().policy.stage_lengths == ()
    assert len(best.require().policy.resident_experts) == 3


@pytest.mark.parametrize("seed", range(3))
def test_of_equal_gpus_no_lengths_are_better_and_none_is_beyond_the_bound(seed):
    """Every way of sharing out layers that cannot be shared out evenly, under policies of all kinds."""
    rng = Random(f"equal {seed}")
    dense, count = (0, 1, 2)[seed], (2, 3, 2)[seed]
    spec = tiny_spec(
        num_layers=7, hidden_size=256, intermediate_size=512, num_dense_layers=dense, dense_intermediate_size=300
    )
    sizes = {"gpu_bytes": rng.uniform(8e6, 30e6), "flops": rng.uniform(0.2e12, 4e12), "moves": rng.uniform(1e9, 12e9)}
    profile = equal(count, cpu_bytes=rng.uniform(30e6, 80e6), **sizes)
    found = search(space(profile, Parallelism.PIPELINE, spec))
    rates, bounds = {}, []
    lengths = [ends for ends in product(range(1, 7), repeat=count) if sum(ends) == 7 and ends[0] > dense]
    for own, size, number, attention, share in product(lengths, (8, 48), (1, 3), Device, (0, 1)):
        asked = a_policy(
            spec,
            own,
            batch_size=size * number,
            micro_batch_size=size,
            attention=attention,
            gpu_kv_micro_batches=share * number,
            resident_experts=spread_experts(spec, 0),
            kv_tokens_per_micro_batch=kv_tokens_for(size, WORKLOAD.mean_context_len, WORKLOAD.max_context_len),
            prefill_chunk_tokens=max(60, size * number * 40 // 2),
        )
        if (policy := most_residents(spec, profile, asked)) is not None:
            predicted = estimate(spec, policy, profile, WORKLOAD)
            rates[policy] = predicted.tokens_per_s
            bounds.append(predicted.bound_tokens_per_s)
    assert len(rates) > 20
    assert found.tokens_per_s >= 0.99 * max(rates.values()), max(rates, key=lambda policy: rates[policy])
    assert found.bound_tokens_per_s >= max(bounds)
    assert len(found.require().policy.stage_lengths) in {0, count}


def test_lengths_are_not_searched_where_tensor_parallel_is_better_than_any(monkeypatch):
    spec, profile = BUILT_IN_MODELS["glm-4.5-air"], compose("4xRTX-3090", "generic-server")
    monkeypatch.setattr(way, "search_lengths", None)
    found = search(Space(spec, profile, WORKLOADS["mtbench"]))
    assert found.require().policy.parallelism is Parallelism.TENSOR
