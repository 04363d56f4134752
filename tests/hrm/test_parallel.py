"""Several GPUs: all-reduces against a ring, a pipeline against its events, stages against parts."""

from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from hrm.analysis import plan_row
from hrm.buffers import Purpose
from hrm.costs import EXECUTOR, Costs
from hrm.errors import PolicyError
from hrm.estimate import Estimate, estimate
from hrm.formats import Formats
from hrm.hardware import HardwareProfile
from hrm.layers import ExpertDivision
from hrm.machines import compose, one_part
from hrm.memory import plan_memory, purposes
from hrm.model_spec import BUILT_IN_MODELS, ModelSpec
from hrm.parallel import longest_stage, part_of, pipeline_obstacle, stage_layers, tensor_parallel_obstacle
from hrm.phase_work import Turn, job_work
from hrm.policy import Parallelism, Policy, ScheduleName, kv_tokens_for, spread_experts
from hrm.schedules import decode_pipeline, iter_tasks
from hrm.search import Space, search
from hrm.tasks import Device, Phase
from hrm.workload import WORKLOADS, Workload
from tests.hrm.support import machine, random_dimensions, tiny_spec

pytestmark = pytest.mark.usefixtures("rough_bounds")

WORKLOAD = Workload(name="test", prompt_len=40, max_prompt_len=100, gen_len=9)


def a_policy(rng: Random, spec, parallelism=Parallelism.TENSOR, *, num_micro_batches=3) -> Policy:
    micro_batch_size = rng.randint(1, 40)
    return Policy(
        schedule=ScheduleName.CGOPIPE,
        batch_size=micro_batch_size * num_micro_batches,
        micro_batch_size=micro_batch_size,
        attention=rng.choice(list(Device)),
        resident_experts=spread_experts(spec, rng.randint(0, spec.num_layers)),
        kv_tokens_per_micro_batch=kv_tokens_for(micro_batch_size, 49, 109),
        prefill_chunk_tokens=250,
        parallelism=parallelism,
    )


def ring_all_reduce_s(num_gpus: int, num_bytes: float, latency_s: float, bytes_per_s: float):
    """A reduce-scatter and an all-gather, chunk by chunk: GPU g sends to g + 1 in every turn."""
    complete = [[{gpu} for _ in range(num_gpus)] for gpu in range(num_gpus)]
    turns = 0
    for first in (0, 1):  # reduce-scatter starts at a GPU's own chunk, all-gather at the next
        for turn in range(num_gpus - 1):
            sent = {gpu: (gpu + first - turn) % num_gpus for gpu in range(num_gpus)}  # chunk that each GPU sends
            before = [[set(chunk) for chunk in chunks] for chunks in complete]
            for gpu, chunk in sent.items():
                complete[(gpu + 1) % num_gpus][chunk] |= before[gpu][chunk]
            turns += 1
    everyone = set(range(num_gpus))
    assert all(chunk == everyone for chunks in complete for chunk in chunks)
    return turns * (latency_s + num_bytes / num_gpus / bytes_per_s)


@pytest.mark.parametrize("num_gpus", [2, 3, 4, 8])
def test_all_reduce_takes_as_long_as_a_ring(num_gpus):
    spec = tiny_spec(hidden_size=96, num_heads=24, num_kv_heads=24)
    profile = machine(num_gpus=num_gpus, peer=3e9, latency_s=1e-5)
    rank = part_of(spec, profile, Parallelism.TENSOR)
    seconds = Costs(*rank, Formats.of("bfloat16")).all_reduce(50)
    assert seconds == pytest.approx(ring_all_reduce_s(num_gpus, 50 * 96 * 2, 1e-5, 3e9))


def test_one_gpu_reduces_nothing():
    assert Costs(tiny_spec(), machine(), Formats.of("bfloat16")).all_reduce(50) == 0


def test_ranks_do_together_what_one_gpu_does_and_sum_up_twice_a_layer():
    """Work and weights of ranks add up to the model's; beside them are two sums a layer, and one of all at the end."""
    spec = tiny_spec(num_heads=8, num_kv_heads=4, vocab_size=128, intermediate_size=128)
    formats = Formats.of("bfloat16")
    whole, part = spec.layer_kind(0), spec.of_rank(4).layer_kind(0)
    for of_whole, of_rank in (
        (whole.mixer.attend(formats, 20, 30), part.mixer.attend(formats, 20, 30)),
        (whole.finish(formats, 20), part.finish(formats, 20)),
        (whole.run_experts(formats, 20, 8), part.run_experts(formats, 20, 8)),
    ):
        assert 4 * of_rank.flops == pytest.approx(of_whole.flops)
    assert part.expert_bytes(formats.weights) * 4 == whole.expert_bytes(formats.weights)
    rank = part_of(spec, machine(num_gpus=4, peer=3e9), Parallelism.TENSOR)
    policy = a_policy(Random(1), rank.spec)
    tasks = iter_tasks(decode_pipeline(rank.spec, policy, num_steps=2), policy.schedule)
    sums = Counter((task.id.act, task.id.layer) for task in tasks if task.id.act.reduces)
    last = spec.num_layers - 1
    assert {act.name for act, _ in sums} == {"REDUCE_HIDDEN", "REDUCE_ATTENTION", "REDUCE_LAST"}
    assert all(count == 3 * 2 for count in sums.values())
    assert Counter(layer for _, layer in sums) == {layer: 2 + (layer == last) for layer in range(spec.num_layers)}


def test_slower_links_between_gpus_never_help():
    for seed in range(30):
        rng = Random(seed)
        spec = replace(random_dimensions(rng), num_heads=4).spec
        policy = a_policy(rng, spec)
        rates = [
            estimate(spec, policy, machine(num_gpus=2, peer=peer), WORKLOAD).tokens_per_s for peer in (1e7, 1e9, 1e12)
        ]
        assert rates == sorted(rates), seed
        assert rates[0] < rates[-1], seed


def test_every_rank_has_all_hidden_states_and_its_part_of_the_rest():
    spec = tiny_spec(num_heads=8, num_kv_heads=2, vocab_size=256)
    policy = a_policy(Random(1), spec)
    plans = {n: plan_memory(spec, policy, machine(num_gpus=n)).gpu.purposes for n in (1, 2, 8)}
    hidden_bytes = policy.batch_size * spec.hidden_size * 2
    assert hidden_bytes < plans[8][Purpose.EXCHANGE] < plans[2][Purpose.EXCHANGE] < plans[1][Purpose.EXCHANGE]
    norms = 2 * spec.num_layers * (2 * spec.hidden_size + spec.hidden_size * spec.num_experts) + 2 * spec.hidden_size
    for n in (2, 8):
        # Norms and routers are whole on every rank; of two heads of keys and values, four of eight ranks have the same.
        repeated = 2 * 2 * spec.hidden_size * spec.head_dim * spec.num_layers * (n // 2 - 1) * 2
        weights = plans[n][Purpose.RESIDENT_WEIGHTS]
        most = plans[1][Purpose.RESIDENT_WEIGHTS] + (n - 1) * norms + repeated
        assert plans[1][Purpose.RESIDENT_WEIGHTS] < n * weights <= most * 1.001, n
    kept = replace(policy, attention=Device.GPU, gpu_kv_micro_batches=3)
    caches = [plan_memory(spec, kept, machine(num_gpus=n)).gpu.purposes[Purpose.KV_CACHE] for n in (1, 2, 8)]
    assert caches[1] == caches[0] / 2  # two heads on two GPUs
    assert caches[2] == caches[0] / 2  # two heads on eight GPUs: each held by four


def pipeline_events_s(stages: int, batches: int, passes: int, pass_s: float) -> float:
    """Time until `batches` have each gone `passes` times through the stages, at most one a stage.

    As many batches are under way as there are stages; the next one starts when one is done.
    """
    stage_free_s, ends_s = [0.0] * stages, []
    for first in range(0, batches, stages):
        group = range(first, min(first + stages, batches))
        done_s = dict.fromkeys(group, max(ends_s, default=0.0))
        for _ in range(passes):
            for batch in group:
                for stage in range(stages):
                    start_s = max(done_s[batch], stage_free_s[stage])
                    done_s[batch] = stage_free_s[stage] = start_s + pass_s
        ends_s += done_s.values()
    return max(ends_s)


def estimate_alone(part: ModelSpec, policy: Policy, its_machine: HardwareProfile, workload: Workload) -> Estimate:
    """A stage by itself, with nobody before or after it."""
    alone, runtime = replace(policy, parallelism=Parallelism.TENSOR), replace(EXECUTOR, whole_last_layer=True)
    return estimate(part, alone, replace(its_machine, num_stages=1), workload, runtime=runtime)


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("batches", [1, 2, 3, 4, 8])
def test_a_pipeline_takes_as_long_as_its_events(stages, batches):
    """All passes alike: prompts of one token make prefill as long as a step, about."""
    spec = tiny_spec(num_layers=8)
    profile = machine(num_gpus=stages, launch_s=1e-4)
    part, its_machine = part_of(spec, profile, Parallelism.PIPELINE)
    policy = a_policy(Random(2), part, Parallelism.PIPELINE)
    workload = replace(WORKLOAD, gen_len=200, num_requests=batches * policy.batch_size)
    predicted = estimate(spec, policy, profile, workload)
    alone = estimate_alone(part, policy, its_machine, replace(workload, num_requests=policy.batch_size))
    passes = workload.gen_len
    expected_s = pipeline_events_s(stages, batches, passes, alone.seconds / passes)
    assert predicted.seconds == pytest.approx(expected_s, rel=1.5 * stages / passes)
    # While the first batch fills the pipeline the last stages wait, in each round, but for a layer of each. A job of
    # fewer batches takes as long as if there were one for every stage.
    rounds = -(-batches // stages)
    full_s = rounds * stages * alone.seconds
    expected_s = pipeline_events_s(stages, rounds * stages, passes, alone.seconds / passes)
    assert predicted.seconds == pytest.approx(full_s + (expected_s - full_s) * (1 - 1 / part.num_layers), rel=1e-3)
    assert predicted.generated_tokens == batches * policy.batch_size * workload.gen_len


def test_an_endless_pipeline_is_as_fast_as_one_part_with_its_layers_that_prefills_longer():
    spec, profile = BUILT_IN_MODELS["mixtral-8x7b"], compose("4xT4")
    part, one = part_of(spec, profile, Parallelism.PIPELINE)
    assert (part.num_layers, one.num_gpus) == (8, 1)
    assert part.expert_parameters == spec.expert_parameters
    policy = a_policy(Random(3), part, Parallelism.PIPELINE)
    policy = replace(policy, dtype="float16", weight_format="", kv_format="")
    whole = estimate(spec, policy, profile, WORKLOAD)
    alone = estimate_alone(part, policy, one, WORKLOAD)
    # Of four batches the last stage sees the first when three others have prefilled it, but for one of eight layers.
    assert whole.prefill.seconds == pytest.approx((4 + 3 * 7 / 8) / 4 * alone.prefill.seconds)
    assert whole.decode.seconds == alone.decode.seconds


def test_the_longest_stage_has_the_most_layers_and_all_experts():
    spec, profile = BUILT_IN_MODELS["deepseek-v2-lite"], compose("4xT4")
    part, _ = part_of(spec, profile, Parallelism.PIPELINE)
    assert part.num_layers == 7  # of 27 in 4 stages
    assert part.num_expert_layers == 7


# Built-in models, and what they have not: windows of several widths, many dense first layers.
DIVIDED = {
    **BUILT_IN_MODELS,
    "windows": tiny_spec(num_layers=11, attention_windows=(64, 0, 16, 0, 64, 64, 0, 16, 16, 16, 0)),
    "dense": tiny_spec(num_layers=9, num_dense_layers=4, dense_intermediate_size=700),
}


def stage_of(spec: ModelSpec, layers: range) -> ModelSpec:
    """One stage by itself, its dense first layers among its own; embedding and LM head included."""
    return spec.with_layers(spec.layers[layers.start : layers.stop])


def divisions() -> list[tuple[str, int]]:
    return [
        (name, stages)
        for name, spec in DIVIDED.items()
        for stages in (2, 3, 4, 8)
        # A stage of dense layers only is no model: each must have some layer with experts.
        if all(
            any(layer.has_experts for layer in spec.layers[stage.start : stage.stop])
            for stage in stage_layers(spec.num_layers, stages)
        )
    ]


@pytest.mark.parametrize(("name", "stages"), divisions())
def test_stages_add_up_to_the_model_and_none_is_more_than_the_one_that_is_planned(name, stages):
    spec, rng = DIVIDED[name], Random(f"{name} {stages}")
    ranges = stage_layers(spec.num_layers, stages)
    assert [layer for layers in ranges for layer in layers] == list(range(spec.num_layers))
    specs = [stage_of(spec, layers) for layers in ranges]
    held = 2 * sum(stage.total_parameters for stage in specs)
    ends = 2 * (spec.head_parameters + spec.embedding_parameters * (not spec.tied_embeddings))
    assert held + ends == 2 * spec.parameters
    planned, profile = longest_stage(spec, stages), one_part(compose(f"{stages}xH100"), is_stage=True)
    for _ in range(4):
        policy = random_stage_policy(rng, planned)
        assert 0 <= policy.weight_share_on_gpu(planned) <= 1
        most = [sum(level.values()) for level in purposes(planned, policy, batches=stages)]
        costs = Costs(planned, profile, Formats.of("bfloat16"))
        longest = job_work(costs, [Turn(policy, 1.0)], WORKLOAD)
        for stage in specs:
            counts = zip(policy.resident_experts, range(stage.num_layers), strict=False)
            own = replace(
                policy, resident_experts=tuple(min(count, stage.layers[layer].num_experts) for count, layer in counts)
            )
            assert 0 <= own.weight_share_on_gpu(stage) <= 1
            needed = [sum(level.values()) for level in purposes(stage, own, batches=stages)]
            assert all(need <= there for need, there in zip(needed, most, strict=True))
            work = job_work(Costs(stage, profile, Formats.of("bfloat16")), [Turn(own, 1.0)], WORKLOAD)
            for phase, of_longest in zip(work, longest, strict=True):
                assert phase.in_order_s <= of_longest.in_order_s * (1 + (2e-2 if spec.packing else 1e-9))


def random_stage_policy(rng: Random, spec: ModelSpec) -> Policy:
    micro_batch_size, number = rng.choice([4, 64, 500]), rng.choice([1, 3])
    most = spec.num_experts
    counts = [rng.choice([0, most // 2, most])] * spec.num_layers
    if rng.random() < 0.5:
        counts = [rng.randint(0, most) for _ in counts]
    return Policy(
        batch_size=micro_batch_size * number,
        micro_batch_size=micro_batch_size,
        attention=rng.choice(list(Device)),
        ffn=rng.choice(list(Device)),
        resident_experts=tuple(counts),
        resident_dense=rng.random() < 0.7,
        gpu_kv_micro_batches=rng.choice([0, number]),
        kv_tokens_per_micro_batch=kv_tokens_for(micro_batch_size, 49, 109),
        prefill_chunk_tokens=2048,
    )


@pytest.mark.usefixtures("coarse_searches")
@pytest.mark.parametrize(("model", "gpus"), [("deepseek-v2-lite", "2xRTX-3090"), ("glm-4.5-air", "2xA100-80G")])
def test_shares_of_a_plan_are_those_of_its_own_part(model, gpus):
    spec, profile = BUILT_IN_MODELS[model], compose(gpus)
    workload = replace(WORKLOAD, num_requests=300)
    asked = [search(Space(spec, profile, workload, parallelism=parallelism)) for parallelism in Parallelism]
    bests = [(result, way.best) for result in asked for way in result.ways if way.best is not None]
    for found, best in bests:
        policy, part = best.part_policy, best.part.spec
        assert part.num_layers == len(policy.resident_experts)
        streamed = sum(policy.streamed_bytes(part, layer, Phase.PREFILL) for layer in range(part.num_layers))
        share = 1 - streamed / part.total_layer_bytes(policy.formats.weights)
        assert 0 <= share <= 1
        assert best.weight_share_on_gpu == best.paper_tuple[4] == pytest.approx(share)
        assert plan_row(replace(found, best=best))["weight_share_on_gpu"] == share
    assert [result.require().policy.parallelism for result in asked] == list(Parallelism)


def test_a_policy_of_a_stage_is_never_told_against_the_whole_model():
    spec, profile = tiny_spec(num_layers=8), machine(num_gpus=2)
    part, _ = part_of(spec, profile, Parallelism.PIPELINE)
    policy = a_policy(Random(4), part, Parallelism.PIPELINE)
    with pytest.raises(AssertionError, match="own part"):
        policy.weight_share_on_gpu(spec)
    with pytest.raises(PolicyError, match="each of the 2 layers"):
        plan_memory(spec, policy, machine(num_gpus=4))


def test_few_requests_of_a_pipeline_wait_for_batches_of_their_own_size():
    """Nobody waits for a full batch where there is none: here all batches are of 10 requests."""
    spec, profile = tiny_spec(num_layers=8), machine(num_gpus=4)
    part, _ = part_of(spec, profile, Parallelism.PIPELINE)
    large = replace(
        a_policy(Random(4), part, Parallelism.PIPELINE),
        batch_size=3000,
        micro_batch_size=1000,
        kv_tokens_per_micro_batch=160000,
    )
    small = large.for_batch(10)
    job = replace(WORKLOAD, num_requests=10)
    assert estimate(spec, large, profile, job).seconds == pytest.approx(estimate(spec, small, profile, job).seconds)
    # Beside a full batch, the few take as long as it.
    more = estimate(spec, large, profile, replace(WORKLOAD, num_requests=3010))
    full = estimate(spec, large, profile, replace(WORKLOAD, num_requests=3000))
    assert more.seconds == pytest.approx(full.seconds)
    assert more.num_batches == 2


def test_what_cannot_be_divided_says_why():
    spec = BUILT_IN_MODELS["qwen2-57b-a14b"]
    assert "28 heads" in tensor_parallel_obstacle(spec, 8)
    assert not tensor_parallel_obstacle(spec, 4)
    assert "8 layers" not in pipeline_obstacle(spec, 8)
    assert "28 layers are fewer than 32" in pipeline_obstacle(spec, 32)


def test_a_stage_keeps_the_caches_of_all_batches_under_way():
    spec, profile = tiny_spec(num_layers=8), machine(num_gpus=4)
    part, _ = part_of(spec, profile, Parallelism.PIPELINE)
    policy = replace(a_policy(Random(5), part, Parallelism.PIPELINE), gpu_kv_micro_batches=1)
    alone = replace(policy, parallelism=Parallelism.TENSOR)
    stage = plan_memory(spec, policy, profile)
    single = plan_memory(part, alone, machine())
    for level in ("gpu", "cpu"):
        of_stage, of_one = getattr(stage, level).purposes, getattr(single, level).purposes
        assert of_stage["kv_cache"] == 4 * of_one["kv_cache"]
        places = policy.num_micro_batches * policy.micro_batch_size  # the same in every batch
        sent = places * 2 * spec.hidden_size if level == "cpu" else 0
        assert of_stage["exchange"] == of_one["exchange"] * places / policy.batch_size + sent


def search_machine(num_gpus: int, **changes: float):
    return machine(num_gpus=num_gpus, gpu_bytes=num_gpus * 40e6, cpu_bytes=4e8, **changes)


@pytest.mark.usefixtures("coarse_searches")
def test_a_search_takes_the_better_way_and_names_both():
    """Weights that fit are better in a pipeline if peers are slow; else links are better shared."""
    small, large = (tiny_spec(num_layers=16, hidden_size=256, intermediate_size=inner) for inner in (256, 1536))
    chosen = {}
    for name, spec, peer in (("fits", small, 1e6), ("streams", large, 1e12)):
        profile = search_machine(2, peer=peer, link=1e9, cpu_flops=1e9)
        result = search(Space(spec, profile, replace(WORKLOAD, num_requests=None)))
        best = result.require()
        ways = {way.parallelism: way for way in result.ways}
        assert set(ways) == set(Parallelism)
        rates = [way.best.tokens_per_s for way in result.ways if way.best is not None]
        assert best.tokens_per_s == max(rates)
        best.memory.check_fits()
        chosen[name] = best.policy.parallelism
    assert chosen == {"fits": Parallelism.PIPELINE, "streams": Parallelism.TENSOR}


@pytest.mark.usefixtures("coarse_searches")
def test_what_cannot_be_divided_is_not_searched():
    spec = tiny_spec(num_layers=16, num_heads=3, num_kv_heads=3)
    result = search(Space(spec, search_machine(2), WORKLOAD))
    *tensor, pipeline = (way for way in result.ways if not way.gpus)
    assert pipeline.obstacle == ""
    assert [(way.best, "3 heads cannot be divided by 2" in way.obstacle) for way in tensor] == 2 * [(None, True)]
    assert result.require().policy.parallelism is Parallelism.PIPELINE
    neither = search(Space(tiny_spec(num_layers=1, num_heads=3, num_kv_heads=3), search_machine(2), WORKLOAD))
    assert all(way.obstacle for way in neither.ways if not way.gpus)
    assert neither.require().policy.gpus == (0,)


@pytest.mark.usefixtures("coarse_searches")
def test_one_gpu_has_no_ways():
    assert search(Space(tiny_spec(), search_machine(1), WORKLOAD)).ways == ()


@pytest.mark.usefixtures("coarse_searches")
def test_a_policy_that_cannot_be_divided_is_refused():
    spec = BUILT_IN_MODELS["qwen2-57b-a14b"]
    policy = search(Space(spec, compose("1xL40S"), WORKLOADS["mtbench"])).require().policy
    for gpus in (3, 8):
        with pytest.raises(PolicyError, match=r"parallelism is .*tensor.*28 heads cannot be divided"):
            estimate(spec, policy, compose(f"{gpus}xL40S", "generic-server"), WORKLOADS["mtbench"])


@pytest.mark.usefixtures("coarse_searches")
def test_one_way_alone_can_be_asked_for():
    spec = tiny_spec(num_layers=16, hidden_size=256, intermediate_size=256)
    space = Space(spec, search_machine(2, peer=1e9), WORKLOAD, ffn=Device.GPU)
    of_any = search(space)
    ways, best = {(way.parallelism, way.expert_division): way for way in of_any.ways}, of_any.require()
    assert len(ways) == 3
    inner, whole = ExpertDivision
    assert any(way.best is None for way in ways.values())
    for asked, expected in (
        ({"parallelism": Parallelism.TENSOR}, [(Parallelism.TENSOR, inner), (Parallelism.TENSOR, whole)]),
        ({"parallelism": Parallelism.PIPELINE}, [(Parallelism.PIPELINE, inner)]),
        ({"expert_division": inner}, [(Parallelism.TENSOR, inner)]),
        ({"expert_division": whole}, [(Parallelism.TENSOR, whole)]),
    ):
        found = search(replace(space, **asked))
        assert [(way.parallelism, way.expert_division) for way in found.ways] == expected
        for way in found.ways:
            of_all = ways[way.parallelism, way.expert_division]
            if way.best is not None and of_all.best is None:  # it was shown to be hopeless, and so it is
                assert way.best.tokens_per_s <= of_all.at_most_tokens_per_s <= 1.013 * best.tokens_per_s
    with pytest.raises(PolicyError, match="--expert-division is 'whole'"):
        search(replace(space, parallelism=Parallelism.PIPELINE, expert_division=whole))


def test_a_last_layer_with_a_window_is_planned_on_several_gpus():
    """Where what is summed up differs in the last layer and windows make no difference."""
    spec, profile = tiny_spec(attention_windows=(0, 16, 0, 16)), machine(gpu_bytes=6e5, num_gpus=2)
    workload = Workload(name="few", prompt_len=30, max_prompt_len=40, gen_len=8, num_requests=64)
    best = search(Space(spec, profile, workload, parallelism=Parallelism.TENSOR, ffn=Device.GPU)).require()
    assert 0 < best.tokens_per_s <= best.bound_tokens_per_s * (1 + 1e-9)
