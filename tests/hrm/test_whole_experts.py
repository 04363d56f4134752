"""Whole experts in each rank: what falls on the busiest, against drawing it, what a rank has, and when it is chosen."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import msgspec
import numpy as np
import pytest

from hrm.buffers import Purpose
from hrm.errors import PolicyError
from hrm.estimate import estimate
from hrm.formats import FORMATS, Formats
from hrm.layers import Choices, ExpertDivision, GroupedQueryAttention, Layer, RoutedExperts, layer_shares
from hrm.layers.choices import greatest_of
from hrm.memory import plan_memory
from hrm.model_spec import BUILT_IN_MODELS, ModelSpec
from hrm.parallel import tensor_parallel_obstacle
from hrm.policy import Parallelism, Policy, kv_tokens_for
from hrm.policy_file import load_policy_file, policy_file_of, save_policy_file
from hrm.search import SearchResult, Space, search
from hrm.tasks import Device
from hrm.workload import Workload
from tests.hrm.support import machine, tiny_spec

INNER, WHOLE = ExpertDivision
WORKLOAD = Workload(name="test", prompt_len=40, max_prompt_len=100, gen_len=9)


def drawn(choices: Choices, tokens: int, experts: int, weights: Sequence[float] = ()) -> tuple[float, float]:
    """Experts reached and choices that fall on the first `experts` of each rank's, where most do; means of many draws.

    With `weights` tokens choose one after the other in proportion to them, and ranks have experts by chance.
    """
    rng, found = np.random.default_rng(17), []
    there_are = choices.experts + choices.idle
    for _ in range(max(250, 1500 // tokens)):
        keys = rng.gumbel(size=(tokens, there_are))  # the greatest are a choice without replacement
        if weights:
            keys += rng.permutation(np.log(weights))
        chosen = np.argpartition(-keys, choices.per_token - 1, axis=1)[:, : choices.per_token]
        counts = np.bincount(chosen.ravel(), minlength=there_are)[: choices.experts]
        here = counts.reshape(choices.ranks, -1)[:, :experts]
        found.append(((here > 0).sum(1).max(), here.sum(1).max()))
    reached, fallen_on = np.mean(found, axis=0)
    return reached, fallen_on


@pytest.mark.parametrize("tokens", [1, 3, 20, 100])
@pytest.mark.parametrize(
    ("experts", "per_token", "ranks"), [(8, 2, 2), (8, 2, 4), (16, 4, 8), (64, 6, 4), (128, 8, 2), (128, 8, 8)]
)
def test_the_busiest_rank_is_that_of_drawn_choices(experts: int, per_token: int, ranks: int, tokens: int) -> None:
    """Of all that a rank has, and of a half of it, as where the others are computed elsewhere."""
    choices = Choices(experts=experts, per_token=per_token, ranks=ranks)
    for here in {experts // ranks, max(1, experts // ranks // 2)}:
        reached, fallen_on = drawn(choices, tokens, here)
        few = per_token * tokens * here / experts <= 1  # at most one choice for a rank: by rounder figures
        assert choices.reached(tokens, here) == pytest.approx(reached, rel=0.2 if few else 0.05)
        assert choices.fallen_on(tokens, here) == pytest.approx(fallen_on, rel=0.2 if few else 0.05)


@pytest.mark.parametrize("tokens", [4, 50, 400])
def test_favoured_experts_load_the_rank_that_has_them(tokens: int) -> None:
    weights = tuple(1 / (1 + place) for place in range(32))
    rng = np.random.default_rng(3)
    keys = np.log(weights) + rng.gumbel(size=(40_000, 32))
    frequencies = np.bincount(np.argpartition(-keys, 3, axis=1)[:, :4].ravel(), minlength=32) / len(keys)
    choices = Choices(experts=32, per_token=4, ranks=4, frequencies=tuple(frequencies.tolist()))
    reached, fallen_on = drawn(choices, tokens, 8, weights)
    assert choices.reached(tokens, 8) == pytest.approx(reached, rel=0.06)
    assert choices.fallen_on(tokens, 8) == pytest.approx(fallen_on, rel=0.06)
    evenly = replace(choices, frequencies=())
    assert choices.fallen_on(tokens, 8) > 1.05 * evenly.fallen_on(tokens, 8)
    uniform = replace(choices, frequencies=(4 / 32,) * 32)
    for one, other in ((uniform.reached, evenly.reached), (uniform.fallen_on, evenly.fallen_on)):
        assert one(tokens, 8) == pytest.approx(other(tokens, 8))


def test_experts_that_compute_nothing_fall_on_no_rank() -> None:
    choices = Choices(experts=16, per_token=4, idle=8, ranks=4)
    for tokens in (2, 30):
        reached, fallen_on = drawn(choices, tokens, 4)
        assert choices.reached(tokens, 4) == pytest.approx(reached, rel=0.05)
        assert choices.fallen_on(tokens, 4) == pytest.approx(fallen_on, rel=0.05)


def test_the_greatest_of_normal_variables() -> None:
    assert greatest_of(1) == pytest.approx((0, 1), abs=1e-5)
    assert greatest_of(2) == pytest.approx((np.pi**-0.5, 1), abs=1e-4)
    draws = np.random.default_rng(1).standard_normal((200_000, 8)).max(1)
    assert greatest_of(8) == pytest.approx((draws.mean(), (draws**2).mean()), rel=0.01)


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("skewed", [False, True])
def test_arrays_of_policies_are_counted_as_single_ones(ranks: int, *, skewed: bool) -> None:
    frequencies = tuple(min(1.0, 8 / (1 + place) / 3) for place in range(16)) if skewed else ()
    choices = Choices(experts=16, per_token=4, ranks=ranks, frequencies=frequencies)
    tokens = np.array([0.25, 1.0, 3.5, 3.5, 900.0])
    experts = np.array([0.5, 1.0, 2.0, 1.5, 16 / ranks])
    for count in (choices.reached, choices.fallen_on):
        assert count(tokens, experts) == pytest.approx([count(*pair) for pair in zip(tokens, experts, strict=True)])


def test_a_token_costs_no_more_among_more_and_an_expert_no_less() -> None:
    """What a bound over many policies is made of."""
    tokens, experts = np.geomspace(0.01, 10_000, 400), np.linspace(0.01, 8, 400)
    choices = Choices(experts=64, per_token=6, ranks=8)
    for count in (choices.reached, choices.fallen_on):
        for here in (0.5, 1.0, 4.0, 8.0):
            assert (np.diff(count(tokens, here + 0 * tokens) / tokens) <= 1e-12).all()
        for few in (0.5, 1.0, 20.0, 3000.0):
            assert (np.diff(count(few + 0 * experts, experts)) >= -1e-9).all()


HIDDEN = 32
EXPERTS = RoutedExperts(
    hidden_size=HIDDEN,
    num_experts=8,
    experts_per_token=3,
    intermediate_size=24,
    shared_intermediate_size=20,
    vectors=(("score_correction", 8), ("shared_w2_bias", HIDDEN)),
    expert_vectors=(("w13_bias", 48), ("w2_bias", HIDDEN)),
)
MIXER = GroupedQueryAttention(hidden_size=HIDDEN, num_heads=8, num_kv_heads=4, head_dim=6)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_has_whole_experts_with_their_biases_and_its_part_of_all_else(ranks: int) -> None:
    layer = Layer(mixer=MIXER, ffn=(EXPERTS,))
    whole, divided = layer.of_rank(ranks, WHOLE), layer.of_rank(ranks)
    block = whole.experts[0]
    assert (block.num_experts, block.all_experts, block.intermediate_size) == (8 // ranks, 8, 24)
    assert [expert for rank in range(ranks) for expert in whole.experts_of(rank)] == [*range(8)]
    assert all(divided.experts_of(rank) == range(8) for rank in range(ranks))
    for rank in range(ranks):
        ours, theirs = (layer_shares(layer, narrow, rank, ranks) for narrow in (whole, divided))
        for tensor in layer.tensors:
            share = ours[tensor.name]
            if tensor.name in {"w13", "w2", "w13_bias", "w2_bias"}:
                assert not share.has_noughts
                assert sum(span.size for span in share.rows) * share.columns.size == tensor.parameters
            else:
                assert share == theirs[tensor.name]
        assert ours["shared_w2_bias"].is_empty == (rank > 0)


def test_packed_experts_stay_packed_and_whole_where_their_groups_do_not_divide() -> None:
    """Of a group of 16 rows for three ranks, divided ones have noughts besides."""
    experts = replace(EXPERTS, num_experts=9, intermediate_size=64, shared_intermediate_size=0, expert_vectors=())
    experts = replace(experts, vectors=())
    layer = Layer(
        mixer=replace(MIXER, num_heads=6, num_kv_heads=3),
        ffn=(experts,),
        packed=(("w13", "fp8-b16"), ("w2", "fp8-b16")),
    )
    whole, divided = (layer.of_rank(3, division) for division in (WHOLE, INNER))
    plain = FORMATS["bfloat16"]
    assert dict(whole.packed) == dict(layer.packed)
    assert whole.expert_bytes(plain) == layer.expert_bytes(plain)
    assert 3 * whole.num_experts * whole.expert_bytes(plain) == layer.num_experts * layer.expert_bytes(plain)
    assert 3 * divided.num_experts * divided.expert_bytes(plain) > 1.2 * layer.num_experts * layer.expert_bytes(plain)


def test_ranks_do_together_what_is_to_be_done_and_wait_for_the_busiest() -> None:
    spec = tiny_spec(num_experts=8, experts_per_token=2)
    formats = Formats.of("bfloat16")
    of_all = spec.layer_kind(0).run_experts(formats, 400, 8)
    even, uneven = (spec.of_rank(4, division).layer_kind(0) for division in (INNER, WHOLE))
    assert 4 * even.run_experts(formats, 400, 8).flops == pytest.approx(of_all.flops)
    busiest = uneven.run_experts(formats, 400, 2)
    assert 1.05 * of_all.flops < 4 * busiest.flops < 1.15 * of_all.flops
    assert busiest.unfused_launches < 0.3 * even.run_experts(formats, 400, 8).unfused_launches
    assert spec.of_rank(4, WHOLE).active_parameters < spec.active_parameters


def a_policy(spec: ModelSpec, **changes: object) -> Policy:
    values = {
        "batch_size": 60,
        "micro_batch_size": 20,
        "attention": Device.GPU,
        "resident_experts": (1,) * spec.num_layers,
        "kv_tokens_per_micro_batch": kv_tokens_for(20, 49, 109),
        "prefill_chunk_tokens": 250,
    }
    return Policy(**{**values, **changes})


def test_a_policy_says_which_and_is_counted_so() -> None:
    spec, profile = tiny_spec(num_experts=8), machine(num_gpus=4)
    inner, whole = (a_policy(spec, expert_division=division) for division in ExpertDivision)
    slots = [plan_memory(spec, policy, profile).gpu.purposes[Purpose.WEIGHT_SLOTS] for policy in (inner, whole)]
    assert slots[1] < 0.6 * slots[0], "of two whole ones it streams the other, of eight parts all but one"
    assert estimate(spec, whole, profile, WORKLOAD).part.spec.num_experts == 2
    with pytest.raises(PolicyError, match=r"resident_experts\[0\] is 3.*at most the 2 experts"):
        estimate(spec, replace(whole, resident_experts=(3,) * 4), profile, WORKLOAD)
    with pytest.raises(PolicyError, match=r"expert_division is 'whole': must be inner in a pipeline"):
        replace(whole, parallelism=Parallelism.PIPELINE)
    with pytest.raises(PolicyError, match=r"expert_division is 'whole'.*its 6 experts cannot be divided by 4"):
        estimate(tiny_spec(num_experts=6), whole, profile, WORKLOAD)


def test_a_file_of_before_divides_experts(tmp_path) -> None:
    spec, profile = tiny_spec(num_experts=8), machine(num_gpus=2)
    found = estimate(spec, a_policy(spec, expert_division=WHOLE), profile, WORKLOAD)
    path = tmp_path / "policy.json"
    save_policy_file(path, policy_file_of(found, spec, profile, WORKLOAD))
    assert load_policy_file(path).policy == found.policy
    older = msgspec.json.decode(path.read_bytes())
    del older["policy"]["expert_division"]
    for kind in older["model"]["kinds"]:
        for block in kind["ffn"]:
            del block["expert_ranks"]
    path.write_bytes(msgspec.json.encode(older))
    assert load_policy_file(path).policy == replace(found.policy, expert_division=INNER)


FAVOURED = tuple(min(1.0, 0.02 + 1.3 / (1 + place)) for place in range(32))  # of two choices


def searched(spec: ModelSpec, division: ExpertDivision | None = None, **changes: float) -> SearchResult:
    profile = machine(num_gpus=2, gpu_bytes=80e6, cpu_bytes=4e8, cpu_flops=1e9, **changes)
    tensor = Space(spec, profile, WORKLOAD, parallelism=Parallelism.TENSOR, max_micro_batch_size=4096)
    tensor = replace(tensor, attention=Device.GPU, ffn=Device.GPU)  # the CPU is slow here
    return search(replace(tensor, expert_division=division))


@pytest.mark.usefixtures("quick_bounds")
def test_whole_experts_are_chosen_where_launches_take_long_and_not_where_one_rank_is_waited_for() -> None:
    spec = tiny_spec(num_layers=8, hidden_size=256, intermediate_size=64, num_experts=32)
    for launch_s, expected in ((1e-4, WHOLE), (0.0, INNER)):
        model = spec if launch_s else spec.with_frequencies(FAVOURED)
        ask = partial(searched, model, peer=1e11, link=1e9, launch_s=launch_s, gpu_flops=1e12)
        rates = {division: ask(division=division).tokens_per_s for division in ExpertDivision}
        result = ask()
        assert result.require().policy.expert_division is expected, rates
        if expected is WHOLE:
            assert rates[WHOLE] > 1.1 * rates[INNER]
        else:
            assert result.tokens_per_s * 1.003 >= max(rates.values())


@pytest.mark.usefixtures("quick_bounds")
def test_they_are_found_where_experts_cannot_be_divided() -> None:
    spec = tiny_spec(num_layers=4, intermediate_size=95)
    assert "95 inner units cannot be divided by 2" in tensor_parallel_obstacle(spec, 2)
    assert not tensor_parallel_obstacle(spec, 2, WHOLE)
    result = searched(spec, peer=1e10)
    assert result.require().policy.expert_division is WHOLE
    inner, whole = result.ways
    assert (inner.best, whole.obstacle) == (None, "")
    assert inner.obstacle


@pytest.mark.parametrize(("model", "ranks"), [("gpt-oss-20b", 4), ("qwen3-30b-a3b", 4)])
def test_models_whose_groups_do_not_divide_lose_nothing(model: str, ranks: int) -> None:
    spec = BUILT_IN_MODELS[model]
    if not spec.packing:
        forms = (("w13", "fp8-b128"), ("w2", "fp8-b128"))
        spec = spec.with_layers(replace(layer, packed=forms) for layer in spec.layers)
    plain = FORMATS["bfloat16"]
    experts = {
        division: ranks * narrow.num_experts * narrow.expert_bytes(plain)
        for division in ExpertDivision
        for narrow in (spec.of_rank(ranks, division),)
    }
    assert experts[WHOLE] == spec.num_experts * spec.expert_bytes(plain) < experts[INNER]


ESTIMATE = (
    "--model",
    "mixtral-8x7b",
    "--gpus",
    "2xA100-80G",
    "--prompt-len",
    "77",
    "--gen-len",
    "64",
    "-u",
    "64",
    "-n",
    "2",
)


def test_a_command_asks_for_either_and_says_which(hrm, hrm_json) -> None:
    code, out, _ = hrm("estimate", *ESTIMATE, "--expert-division", "whole", "--resident-experts", "2")
    assert code == 0
    assert "whole experts in each rank: 4 of 8" in out
    assert "2 of 4 a layer stay" in out
    assert "experts divided by their inner size" in hrm("estimate", *ESTIMATE)[1]
    assert hrm_json("estimate", *ESTIMATE, "--expert-division", "whole")["policy"]["expert_division"] == "whole"
    code, _, err = hrm("estimate", *ESTIMATE, "--expert-division", "whole", "--resident-experts", "5")
    assert (code, "at most the 4 experts" in err) == (2, True)


def test_a_command_refuses_what_cannot_be_divided_or_is_a_pipeline(hrm) -> None:
    code, _, err = hrm("estimate", *ESTIMATE[:3], "3xA100-80G", *ESTIMATE[4:], "--expert-division", "whole")
    assert (code, "its 8 experts cannot be divided by 3" in err) == (2, True)
    code, _, err = hrm("search", *ESTIMATE[:8], "--parallelism", "pipeline", "--expert-division", "inner")
    assert (code, "--expert-division is 'inner'" in err) == (2, True)
