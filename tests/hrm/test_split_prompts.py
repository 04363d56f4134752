"""Prompts longer than a chunk: their costs, their memory, and when the search splits them."""

import json
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from hrm.buffers import Purpose, prefix_bytes
from hrm.closed_form import Point, whole_prefill
from hrm.contention import ALONE
from hrm.costs import Costs
from hrm.errors import PolicyError
from hrm.estimate import estimate
from hrm.formats import Formats
from hrm.machines import compose, with_memory
from hrm.memory import plan_memory
from hrm.model_spec import BUILT_IN_MODELS
from hrm.phases import prefill_seconds, prefill_work, simulate_work
from hrm.policy import Policy, ScheduleName, kv_tokens_for, prefix_tokens_for
from hrm.policy_file import load_policy_file, policy_file_of, save_policy_file
from hrm.search import Space, lattice, search, solver_named
from hrm.tasks import Device
from hrm.units import GB
from hrm.workload import Workload
from tests.hrm.support import machine, random_spec, tiny_spec

pytestmark = pytest.mark.usefixtures("rough_bounds")

LONG = Workload(name="long", prompt_len=4000, max_prompt_len=8000, gen_len=128)


@pytest.mark.parametrize("parts", [1, 2, 3, 12])
def test_attention_of_a_split_prompt_is_counted_part_by_part(parts):
    """Every token sees half of its own part, as a causal one does, and all earlier parts."""
    spec, length = tiny_spec(), 2400
    part = length // parts
    chunks = [spec.attention.prefill(Formats.of("bfloat16"), part, length)] * parts
    whole = spec.attention.prefill(Formats.of("bfloat16"), length, length)
    flops = num_bytes = 0.0
    for number in range(parts):
        seen = number * part + part / 2
        flops += 4 * part * seen * spec.query_size
        num_bytes += 2 * part * (2 * spec.query_size + spec.attention.cached_elements)
        num_bytes += 2 * number * part * spec.attention.cached_elements  # read again
    index = next(i for i, kernel in enumerate(whole.kernels) if kernel.rows == length and i == 1)
    assert sum(chunk.kernels[index].flops for chunk in chunks) == pytest.approx(flops)
    assert sum(chunk.kernels[index].num_bytes for chunk in chunks) == pytest.approx(num_bytes)
    assert chunks[0].kernels[index].rows == part
    assert sum(chunk.requests for chunk in chunks) == parts, "each part is launched once"
    assert sum(chunk.flops for chunk in chunks) == pytest.approx(whole.flops)


def test_of_latent_attention_the_expanded_prefix_is_kept_and_read_again():
    spec = BUILT_IN_MODELS["deepseek-v2"]
    mixer: Any = spec.layers[0].mixer
    of_token = (mixer.query_size + mixer.returned_elements) * 2
    assert prefix_bytes(spec, Formats.of("bfloat16"), 1) == of_token
    whole, halves = (mixer.prefill(Formats.of("bfloat16"), n, 1000) for n in (1000, 500))
    more = 2 * halves.kernels[2].num_bytes - whole.kernels[2].num_bytes
    assert more == pytest.approx(500 * of_token), "the second half reads the first once more"
    assert prefix_tokens_for(spec, Formats.of("bfloat16"), 1000, 500, cpu_attention=0) == 1000
    assert prefix_tokens_for(spec, Formats.of("bfloat16"), 1000, 1000, cpu_attention=1) == 0


def a_policy(spec, **changes) -> Policy:
    given = {
        "batch_size": 12,
        "micro_batch_size": 4,
        "resident_experts": (1,) * spec.num_layers,
        "kv_tokens_per_micro_batch": kv_tokens_for(4, 328, 328),
        "prefill_chunk_tokens": 40,
        **changes,
    }
    return Policy(**given)


@pytest.mark.parametrize("chunk", [20, 64, 160, 320])
def test_lane_work_of_the_closed_form_is_that_of_the_simulated_tasks(chunk):
    workload = Workload(name="test", prompt_len=320, max_prompt_len=320, gen_len=8)
    for seed in range(10):
        spec = random_spec(Random(seed))
        profile = machine(link=1e8, launch_s=1e-6)
        costs = Costs(spec, profile, Formats.of("bfloat16"))
        policy = a_policy(
            spec, prefill_chunk_tokens=chunk, prefix_buffer_tokens=320, resident_experts=(0,) * spec.num_layers
        )
        work = replace(prefill_work(costs, policy, workload), stretch=ALONE)
        assert work.pipeline.num_micro_batches == 12 * 320 // chunk
        lanes = whole_prefill(costs, Point.of_policy(policy, spec), workload).lanes
        for lane, seconds in simulate_work(work).busy_s().items():
            assert lanes[lane] == pytest.approx(seconds, rel=2e-3), (seed, lane)
        predicted = estimate(spec, policy, profile, workload)
        assert predicted.prefill.bound_s <= predicted.prefill.seconds * (1 + 1e-4)


def test_prefill_in_parts_takes_the_seconds_that_it_took():
    """Golden: Mixtral 8x7B on a T4, 8 prompts of 4000 tokens, in chunks of 8000 to 500 tokens."""
    spec, profile = BUILT_IN_MODELS["mixtral-8x7b"], compose("1xT4")
    costs = Costs(spec, profile, Formats.of("float16"))
    workload = replace(LONG, max_prompt_len=4000)
    seconds = {}
    for chunk in (8000, 4000, 2000, 1000, 500):
        policy = Policy(
            batch_size=8,
            micro_batch_size=4,
            resident_experts=(0,) * 32,
            dtype="float16",
            kv_tokens_per_micro_batch=kv_tokens_for(4, 4128, 4128),
            prefill_chunk_tokens=chunk,
            prefix_buffer_tokens=4000 * (chunk < 4000),
        )
        seconds[chunk] = round(prefill_seconds(costs, policy, workload), 2)
    assert seconds == GOLDEN_S


GOLDEN_S = {8000: 39.14, 4000: 45.58, 2000: 55.14, 1000: 71.72, 500: 103.67}


def test_the_prefix_buffer_is_planned_where_the_gpu_has_no_other_place():
    spec, profile = tiny_spec(), machine()
    split = a_policy(spec, prefix_buffer_tokens=320)
    assert split.max_prompt_tokens(spec) == 320
    plan = plan_memory(spec, split, profile)
    assert plan.gpu.purposes[Purpose.PREFIX_BUFFER] == 320 * 2 * spec.kv_size * 2
    for elsewhere in ({"attention": Device.GPU}, {"gpu_kv_micro_batches": 3}):
        policy = a_policy(spec, **elsewhere)
        assert policy.max_prompt_tokens(spec) == policy.kv_tokens_per_micro_batch
        assert "prefix_buffer" not in plan_memory(spec, policy, profile).gpu.purposes
    assert a_policy(spec).max_prompt_tokens(spec) == a_policy(spec).prefill_chunk_tokens
    with pytest.raises(PolicyError, match="prefix_buffer_tokens is -1: must be at least 0"):
        a_policy(spec, prefix_buffer_tokens=-1)


def test_a_policy_file_of_before_is_one_that_splits_nothing(tmp_path):
    spec, profile = tiny_spec(), machine()
    policy, path = a_policy(spec, attention=Device.CPU), tmp_path / "policy.json"
    content = policy_file_of(estimate(spec, policy, profile, LONG), spec, profile, LONG)
    save_policy_file(path, content)
    before = json.loads(path.read_text())
    del before["policy"]["prefix_buffer_tokens"]
    path.write_text(json.dumps(before))
    assert load_policy_file(path) == content
    assert load_policy_file(path).policy.max_prompt_tokens(spec) == policy.prefill_chunk_tokens


def t4_of(gpu_memory: float):
    return with_memory(compose("1xT4"), gpu_memory_bytes=round(gpu_memory * GB))


def found(profile, workload=LONG):
    spec = BUILT_IN_MODELS["mixtral-8x7b"]
    # With prefill's experts on the CPU there would be room for any prompt.
    space = Space(spec, profile, workload, dtype="float16", schedule=ScheduleName.CGOPIPE, prefill_ffn=Device.GPU)
    return search(space).best


@pytest.fixture
def whole_layers(monkeypatch):
    """No experts that stream in parts, which leave room for any prompt."""
    monkeypatch.setattr(Space, "in_parts", lambda *_: [])


@pytest.mark.usefixtures("whole_layers")
def test_where_the_longest_prompt_fits_no_chunk_there_is_a_policy_now(monkeypatch):
    profile = t4_of(6.5)
    best = found(profile)
    assert best is not None
    policy = best.policy
    assert policy.prefill_chunk_tokens < LONG.max_prompt_len == policy.prefix_buffer_tokens
    assert policy.batch_size > 100
    whole = replace(
        policy,
        batch_size=1,
        micro_batch_size=1,
        resident_experts=(0,) * 32,
        resident_dense=False,
        gpu_kv_micro_batches=0,
        prefill_chunk_tokens=LONG.max_prompt_len,
        prefix_buffer_tokens=0,
        kv_tokens_per_micro_batch=kv_tokens_for(1, LONG.mean_context_len, LONG.max_context_len),
    )
    with pytest.raises(PolicyError, match="memory at level gpu"):
        plan_memory(BUILT_IN_MODELS["mixtral-8x7b"], whole, profile).check_fits()
    monkeypatch.setattr(lattice, "LEAST_CHUNK_TOKENS", 10**9)
    assert found(profile) is None


def test_shorter_chunks_leave_room_for_a_higher_throughput(monkeypatch):
    profile = with_memory(compose("1xL4"), gpu_memory_bytes=8 * GB)
    workload = replace(LONG, prompt_len=2000, gen_len=256, num_requests=200)
    split = found(profile, workload)
    monkeypatch.setattr(lattice, "LEAST_CHUNK_TOKENS", 10**9)
    whole = found(profile, workload)
    assert split is not None
    assert whole is not None
    assert split.policy.prefill_chunk_tokens < LONG.max_prompt_len
    assert split.tokens_per_s > 1.05 * whole.tokens_per_s


@pytest.mark.usefixtures("whole_layers")
def test_programs_split_prompts_as_the_grid_does():
    space = Space(
        spec=BUILT_IN_MODELS["mixtral-8x7b"],
        profile=t4_of(6.5),
        workload=LONG,
        dtype="float16",
        schedule=ScheduleName.CGOPIPE,
    )
    by_milp, by_grid = (search(space, solver_named(name)).require() for name in ("milp", "exhaustive"))
    assert by_milp.policy.prefill_chunk_tokens < LONG.max_prompt_len
    assert by_milp.tokens_per_s == pytest.approx(by_grid.tokens_per_s, rel=0.05)


def test_chunks_stop_at_a_length_that_frees_no_memory():
    for longest, split in ((418, None), (512, (128, 128)), (1984, (128, 496)), (8192, (128, 2048))):
        workload = replace(LONG, prompt_len=10, max_prompt_len=longest)
        space = Space(
            spec=tiny_spec(), profile=machine(), workload=workload, dtype="bfloat16", schedule=ScheduleName.CGOPIPE
        )
        whole, *parts = lattice.chunk_ranges(space)
        assert whole.least == longest
        assert [(part.least, part.most) for part in parts] == ([] if split is None else [split])
