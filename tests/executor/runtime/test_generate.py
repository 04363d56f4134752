"""Real weights: end of sequence, sampling, buffers, failures, memory."""

from dataclasses import replace

import pytest

from executor.batching import Batcher
from executor.checkpoint import Checkpoint
from executor.engine import TaskFailedError
from executor.families import family_for
from executor.handlers import DecodeHandlers, PrefillHandlers
from hrm.acts import NAMES
from hrm.buffers import Purpose
from hrm.contract.rings import WEIGHT_SLOTS
from hrm.memory import purposes
from hrm.policy import ScheduleName
from hrm.schedules import decode_pipeline
from hrm.tasks import Task
from tests.contracts.tasks import act
from tests.executor import reference
from tests.executor.runtime.support import (
    CPU,
    GPU,
    architecture,
    emulated,
    generate,
    generator,
    machine,
    make_policy,
    requests,
)
from tests.executor.tiny_models import random_prompts

PROMPTS = random_prompts(16, seed=5)


@pytest.fixture
def arch(folder):
    return architecture(folder)


# With everything on: all kinds of task occur under one of these.
CPU_POLICY = {"attention": CPU, "ffn": CPU, "resident": 1, "staging": True}
GPU_POLICY = {"attention": GPU, "resident": 1, "resident_dense": False, "staging": True}
PARTS_POLICY = {"attention": GPU, "resident": 1, "resident_dense": False, "experts_per_part": 1}


@pytest.mark.parametrize("schedule", ScheduleName)
def test_end_of_sequence_stops_a_request_and_then_the_run(folder, arch, schedule):
    policy = make_policy(arch.spec.num_layers, schedule=schedule, kv_tokens_per_micro_batch=1024)
    with generator(folder, policy) as made:
        free = generate(made, requests(PROMPTS, max_tokens=8, ignore_eos=True))
        common = [completion.tokens[2] for completion in free.values()]
        made.arch = replace(arch, eos_token_ids=tuple(set(common)))
        (batch,) = Batcher(iter(requests(PROMPTS, max_tokens=100)), policy)
        result = made.generate(batch)
    for completion in result.completions:
        assert completion.tokens == free[completion.request.name].tokens[: len(completion.tokens)]
        assert completion.finish_reason == "stop"
        assert len(completion.tokens) <= 3
    assert result.decode is not None
    assert all(s.num_bytes == 0 for s in result.decode.spans if s.id.step > 2)


def test_length_and_stop_token_end_a_request(folder, arch):
    with generator(folder, make_policy(arch.spec.num_layers)) as made:
        free = generate(made, requests(PROMPTS, max_tokens=5, ignore_eos=True))
        one = free["request-0"]
        assert one.finish_reason == "length"
        assert len(one.tokens) == 5
        stop = one.tokens[3]
        stopped = generate(made, requests(PROMPTS[:1], max_tokens=5, ignore_eos=True, stop_token_ids=(stop,)))[
            "request-0"
        ]
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == one.tokens[: one.tokens.index(stop) + 1]


def test_one_token_needs_no_decode(folder, arch):
    policy = make_policy(arch.spec.num_layers)
    with generator(folder, policy) as made:
        (batch,) = Batcher(iter(requests(PROMPTS, max_tokens=1)), policy)
        result = made.generate(batch)
    assert result.decode is None
    assert all(len(completion.tokens) == 1 for completion in result.completions)


def test_requests_of_different_max_tokens(folder, arch):
    wanted = [requests([prompt], max_tokens=1 + index % 7, ignore_eos=True)[0] for index, prompt in enumerate(PROMPTS)]
    wanted = [replace(request, name=f"r{index}") for index, request in enumerate(wanted)]
    with generator(folder, make_policy(arch.spec.num_layers, attention=GPU)) as made:
        done = generate(made, wanted)
    assert [len(done[f"r{index}"].tokens) for index in range(16)] == [1 + index % 7 for index in range(16)]


def test_sampling_is_the_same_under_every_schedule_and_batch(folder, arch):
    wanted = requests(PROMPTS, max_tokens=6, temperature=0.9, top_p=0.95, ignore_eos=True)
    wanted = [replace(request, params=replace(request.params, seed=index)) for index, request in enumerate(wanted)]
    outcomes = set()
    for schedule in ScheduleName:
        for micro_batch_size in (2, 5):
            policy = make_policy(arch.spec.num_layers, schedule=schedule, micro_batch_size=micro_batch_size)
            with generator(folder, policy) as made:
                done = generate(made, wanted)
            outcomes.add(tuple(done[request.name].tokens for request in wanted))
    assert len(outcomes) == 1
    assert len(set(*outcomes)) > 1


@pytest.mark.parametrize("schedule", ScheduleName)
@pytest.mark.parametrize("choices", [CPU_POLICY, GPU_POLICY], ids=["cpu", "gpu"])
def test_no_weight_slot_is_overwritten_while_it_is_read(folder, arch, choices, schedule):
    policy = make_policy(arch.spec.num_layers, schedule=schedule, **choices)
    policy = replace(policy, resident_dense=False)
    with generator(folder, policy, backend=emulated(machine(bandwidth=2e8))) as made:
        (batch,) = Batcher(iter(requests(PROMPTS, max_tokens=5, ignore_eos=True)), policy)
        result = made.generate(batch)
    assert result.decode is not None
    pipeline = decode_pipeline(arch.spec, policy, num_steps=4)
    loads, reads = {}, {}
    for span in result.decode.spans:
        index = pipeline.load_index(span.id.step, span.id.layer)
        if span.id.act.name == "LOAD_PAGE":
            loads.setdefault(index, []).append(span)
        elif span.id.act in {act("PRE_ATTENTION"), act("POST_ATTENTION")}:
            reads.setdefault(index, []).append(span)
    assert loads.keys() == reads.keys()
    for index, spans in loads.items():
        before = reads[index - WEIGHT_SLOTS] if index >= WEIGHT_SLOTS else []
        first_s = min(span.start_s for span in spans)
        assert all(reader.end_s <= first_s for reader in before)
        posts = [s for s in reads[index] if s.id.act.name == "POST_ATTENTION"]
        assert max(span.end_s for span in spans) <= min(span.start_s for span in posts)


OF_RANKS = {"REDUCE_HIDDEN", "PREFILL_ATTENTION", "OUTPUT_PROJECTION", "REDUCE_ATTENTION", "REDUCE_LAST"}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OF_RANKS])
def test_failure_in_any_kind_of_task_stops_the_run(folder, arch, name, monkeypatch):
    choices = {"LOAD_KV": GPU_POLICY, "LOAD_PART": PARTS_POLICY, "PART_EXPERTS": PARTS_POLICY}
    policy = make_policy(arch.spec.num_layers, **choices.get(name, CPU_POLICY))

    def broken(by_act):
        def made(own):
            def fail(task: Task) -> int:
                raise RuntimeError(f"injected into {task.id}")

            return {act: fail if act.name == name else handler for act, handler in by_act(own).items()}

        return made

    monkeypatch.setattr(PrefillHandlers, "by_act", broken(PrefillHandlers.by_act))
    monkeypatch.setattr(DecodeHandlers, "by_act", broken(DecodeHandlers.by_act))
    with generator(folder, policy) as made:
        (batch,) = Batcher(iter(requests(PROMPTS, max_tokens=4)), policy)
        with pytest.raises(TaskFailedError, match="injected") as failure:
            made.generate(batch)
    assert failure.value.task.id.act.name == name
    assert "!" in failure.value.chart


@pytest.mark.parametrize("choices", [CPU_POLICY, GPU_POLICY, PARTS_POLICY], ids=["cpu", "gpu", "parts"])
def test_peak_memory_stays_within_the_plan(folder, arch, choices):
    policy = make_policy(arch.spec.num_layers, gpu_kv_micro_batches=1, **choices)
    with generator(folder, policy, backend=emulated(machine())) as made:
        generate(made, requests(PROMPTS, max_tokens=5))
        peak = made.peak_bytes
    plan = purposes(arch.spec, policy)
    for level, planned in zip(("gpu", "cpu"), plan, strict=True):
        for purpose, used in peak[level].items():
            assert used <= planned[purpose], (level, purpose)
        assert peak[level][Purpose.KV_CACHE] > 0


def test_trace_is_bounded_and_totals_are_not(folder, arch):
    policy = make_policy(arch.spec.num_layers)
    with generator(folder, policy, max_spans=600) as made:
        (batch,) = Batcher(iter(requests(PROMPTS, max_tokens=10, ignore_eos=True)), policy)
        result = made.generate(batch)
    assert result.decode is not None
    kept = len(result.prefill.spans) + len(result.decode.spans)
    assert 0 < kept <= 600
    assert result.decode.spans_left_out > 0
    samples = result.decode.by_kind["SAMPLE"]
    assert samples.count == 9 * policy.num_micro_batches


@pytest.mark.parametrize("changes", [CPU_POLICY, GPU_POLICY], ids=["cpu", "gpu"])
def test_routed_tokens_are_those_of_the_reference(folder, arch, changes, monkeypatch):
    policy = make_policy(arch.spec.num_layers, **changes)
    with generator(folder, policy) as made:
        (batch,) = Batcher(iter(requests(PROMPTS, max_tokens=4, ignore_eos=True)), policy)
        result = made.generate(batch)
    with Checkpoint.open(folder) as checkpoint:
        family = family_for(checkpoint.config, checkpoint.config_path)
        model = reference.load(family, checkpoint, arch)
    seen = []

    def route(*args):
        _, experts_TK = routes(*args)
        is_last = len(seen) % layers == layers - 1
        experts_TK = experts_TK[len(prompt) - 1 :] if is_last else experts_TK  # are sampled from
        seen.append(experts_TK.flatten().bincount(minlength=arch.spec.num_experts).tolist())
        return routes(*args)

    routes, layers = reference.route, arch.spec.num_layers
    monkeypatch.setattr(reference, "route", route)
    for completion in result.completions:  # the last token is never put in again
        prompt = completion.request.prompt
        reference.forward(model, [*prompt, *completion.tokens[:-1]])
    by_layer = [[sum(expert) for expert in zip(*seen[i::layers], strict=True)] for i in range(layers)]
    assert result.routed_tokens == tuple(map(tuple, by_layer))
