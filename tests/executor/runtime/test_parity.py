"""Greedy tokens equal those of transformers, whatever the policy and the schedule."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from executor import native
from hrm.buffers import Purpose
from hrm.memory import plan_memory
from hrm.policy import ScheduleName
from tests.contracts.selection import chosen, covering, pairs
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
from tests.executor.tiny_models import MODELS, random_prompts, transformers_greedy

SCHEDULES = tuple(ScheduleName)
MAX_TOKENS = 4  # three steps of decode: a first one, one amid others and a last one
PROMPTS = random_prompts(16)

# Every value of every choice, and the pairs that share buffers or edges.
POLICIES = {
    "all streamed, both on the gpu": {"attention": GPU, "resident_dense": False},
    "attention on the cpu": {"attention": CPU, "resident_dense": False},
    "ffn on the cpu": {"attention": GPU, "ffn": CPU},
    "ffn on the cpu, dense streams": {"ffn": CPU, "resident_dense": False, "resident": 2},
    "both on the cpu": {"attention": CPU, "ffn": CPU, "resident": 1},
    "prefill's experts on the cpu": {"attention": GPU, "ffn": CPU, "prefill_ffn": CPU},
    "prefill's experts on the cpu, dense streams": {
        "ffn": CPU,
        "prefill_ffn": CPU,
        "resident_dense": False,
        "resident": 2,
    },
    "prefill's experts on the cpu, ragged, staged": {
        "ffn": CPU,
        "prefill_ffn": CPU,
        "resident_experts": "ragged",
        "resident_dense": False,
        "staging": True,
    },
    "some experts stay": {"attention": CPU, "resident": 3},
    "some experts stay, ragged": {"attention": GPU, "resident_experts": "ragged"},
    "all stay": {"attention": CPU, "resident": "all"},
    "all stay, ffn on the cpu": {"attention": GPU, "ffn": CPU, "resident": "all"},
    "experts stay, dense streams": {"resident": "all", "resident_dense": False},
    "kv split, gpu": {"attention": GPU, "gpu_kv_micro_batches": 2, "resident": 1},
    "kv split, cpu": {"attention": CPU, "gpu_kv_micro_batches": 1, "resident": 1},
    "kv split, both cpu": {"attention": CPU, "ffn": CPU, "gpu_kv_micro_batches": 3},
    "kv on the gpu": {"attention": GPU, "gpu_kv_micro_batches": 4, "resident": 1},
    "one at a time": {"micro_batch_size": 1, "batch_size": 3, "resident": 2},
    "one at a time, gpu": {"attention": GPU, "micro_batch_size": 1, "batch_size": 5},
    "one micro-batch": {"micro_batch_size": 16, "kv_tokens_per_micro_batch": 1024},
    "one micro-batch, gpu": {"attention": GPU, "micro_batch_size": 16, "kv_tokens_per_micro_batch": 1024, "ffn": CPU},
    "uneven": {"batch_size": 10, "micro_batch_size": 4, "resident": 1},
    "uneven, gpu": {"attention": GPU, "batch_size": 7, "micro_batch_size": 3, "gpu_kv_micro_batches": 1},
    "staged": {"staging": True, "resident_dense": False},
    "staged, gpu, uneven": {"staging": True, "attention": GPU, "batch_size": 10, "resident": 1},
    "small cache": {"kv_tokens_per_micro_batch": 48, "prefill_chunk_tokens": 40},
    "split prompts": {"prefill_chunk_tokens": 7, "prefix_buffer_tokens": 40},
    "split prompts, gpu": {"attention": GPU, "prefill_chunk_tokens": 9, "staging": True},
    "split prompts, kv on the gpu": {"gpu_kv_micro_batches": 4, "prefill_chunk_tokens": 13},
    "split prompts, prefill's experts on the cpu": {
        "ffn": CPU,
        "prefill_ffn": CPU,
        "prefill_chunk_tokens": 12,
        "prefix_buffer_tokens": 40,
        "resident": 1,
    },
    "split prompts, kv split": {
        "gpu_kv_micro_batches": 2,
        "prefill_chunk_tokens": 10,
        "prefix_buffer_tokens": 40,
        "ffn": CPU,
    },
    "experts in parts": {"experts_per_part": 2, "attention": GPU},
    "experts in parts, ragged, dense streams": {
        "experts_per_part": 3,
        "resident_experts": "ragged",
        "resident_dense": False,
        "gpu_kv_micro_batches": 1,
    },
    "experts in parts, prefill alone, split prompts": {
        "experts_per_part": 1,
        "ffn": CPU,
        "resident": 1,
        "prefill_chunk_tokens": 10,
        "prefix_buffer_tokens": 40,
    },
}

CHOICES = sorted({choice for policy in POLICIES.values() for choice in policy})


def values_of(name: str) -> set[tuple[str, object]]:
    """What a policy has of every choice, None where it is that of `make_policy`."""
    return {(choice, POLICIES[name].get(choice)) for choice in CHOICES}


def facts_of_case(case: tuple[Any, ...]) -> set[object]:
    """Of a policy and what it is run with: each value, and any two of what comes after schedule and model."""
    name, schedule, model, *others = case
    return {*values_of(name), schedule, model, *pairs((str(place), value) for place, value in enumerate(others))}


def in_turn(
    shared: Callable[[int, str], object], names: Sequence[str] = tuple(POLICIES), models: Sequence[str] = MODELS
) -> list[tuple[Any, ...]]:
    """Policies with schedules, models, what each is shared out over and accelerators, which take turns."""
    return [
        (name, SCHEDULES[index % len(SCHEDULES)], model, shared(index, model), ("cpu", "emulated")[index % 4 == 3])
        for index, name in enumerate(names)
        for model in [models[index % len(models)]]
    ]


# Every policy meets every schedule and every model, and every schedule every model: what goes wrong is of two of them.
# All three in every combination would take five times as long.
PAIRS = [
    (SCHEDULES[turn % len(SCHEDULES)], name, MODELS[(index + turn) % len(MODELS)])
    for index, name in enumerate(POLICIES)
    for turn in range(max(len(SCHEDULES), len(MODELS)))
]
# Policies have values in common: of any two values of choices, schedules and models that meet there, a case has both.
MET = covering(PAIRS, lambda case: pairs({("schedule", case[0]), *values_of(case[1]), ("model", case[2])}))


@cache
def expected(folder: Path) -> dict[str, tuple[int, ...]]:
    return {
        f"request-{index}": tuple(transformers_greedy(folder, prompt, MAX_TOKENS))
        for index, prompt in enumerate(PROMPTS)
    }


def policy_of(folder: Path, schedule: ScheduleName, choices: dict):
    spec = architecture(folder).spec
    choices = dict(choices)
    if choices.get("resident") == "all":
        choices["resident"] = spec.num_experts
    if choices.get("resident_experts") == "ragged":
        choices["resident_experts"] = (0, spec.num_experts, 2)
    return make_policy(spec.num_layers, schedule=schedule, **choices)


@pytest.mark.parametrize(("schedule", "name", "model"), chosen(PAIRS, at=MET))
def test_greedy_tokens_equal_those_of_transformers(request, tiny_folders, schedule, name, model):
    """On all cores under the schedule that overlaps most."""
    if schedule is ScheduleName.CGOPIPE:
        request.getfixturevalue("all_cores")
    folder = tiny_folders[model]
    with generator(folder, policy_of(folder, schedule, POLICIES[name])) as made:
        done = generate(made, requests(PROMPTS, max_tokens=MAX_TOKENS))
    assert {name: completion.tokens for name, completion in done.items()} == expected(folder)


def test_longer_continuations_equal_those_of_transformers(tiny_folder):
    """Of more steps of decode than above, with caches that are streamed and one that stays."""
    prompts, longer = PROMPTS[:8], 3 * MAX_TOKENS
    policy = policy_of(tiny_folder, ScheduleName.CGOPIPE, {**POLICIES["kv split, gpu"], "gpu_kv_micro_batches": 1})
    with generator(tiny_folder, policy) as made:
        done = generate(made, requests(prompts, max_tokens=longer))
    assert {name: list(completion.tokens) for name, completion in done.items()} == {
        f"request-{index}": transformers_greedy(tiny_folder, prompt, longer) for index, prompt in enumerate(prompts)
    }


@pytest.mark.parametrize("name", ["both on the cpu", "one micro-batch, gpu"])
def test_torch_alone_gives_the_same_tokens(tiny_folder, name):
    """Everywhere else the native kernels compute, where they are built."""
    policy = policy_of(tiny_folder, ScheduleName.CGOPIPE, POLICIES[name])
    with native.using(None), generator(tiny_folder, policy) as made:
        done = generate(made, requests(PROMPTS, max_tokens=MAX_TOKENS))
    assert {name: completion.tokens for name, completion in done.items()} == expected(tiny_folder)


# Each schedule with each model; of those that every run has, each with two models and each model with two schedules.
OF_MODELS = [*product(SCHEDULES, MODELS)]
TWICE_EACH = [place for place in range(len(OF_MODELS)) if sum(divmod(place, len(MODELS))) % 5 in (0, 2)]


@pytest.mark.parametrize(("schedule", "model"), chosen(OF_MODELS, at=TWICE_EACH))
def test_emulated_accelerator_gives_the_same_tokens(tiny_folders, schedule, model):
    """Attention in turn on the CPU and, with prefill's experts there, on the GPU."""
    folder, turn = tiny_folders[model], MODELS.index(model) + SCHEDULES.index(schedule)
    attention, prefill_ffn = (CPU, GPU) if turn % 2 else (GPU, CPU)
    choices = {"attention": attention, "resident": 1, "ffn": CPU, "prefill_ffn": prefill_ffn}
    policy = policy_of(folder, schedule, choices)
    backend = emulated(machine(bandwidth=5e8))
    with generator(folder, policy, backend=backend) as made:
        done = generate(made, requests(PROMPTS, max_tokens=MAX_TOKENS))
    assert {name: completion.tokens for name, completion in done.items()} == expected(folder)


def test_layers_larger_than_the_gpu_run_with_their_experts_on_the_host(tiny_folder):
    spec = architecture(tiny_folder).spec
    choices = {"micro_batch_size": 1, "batch_size": 2, "kv_tokens_per_micro_batch": 64, "prefill_chunk_tokens": 4}
    policy = policy_of(tiny_folder, ScheduleName.CGOPIPE, {**choices, "ffn": CPU, "prefix_buffer_tokens": 64})
    streamed, kept = (
        plan_memory(spec, replace(policy, prefill_ffn=device), machine()).gpu.planned_bytes for device in (GPU, CPU)
    )
    backend = emulated(machine(gpu_bytes=kept, bandwidth=5e8))
    policy = replace(policy, prefill_ffn=CPU)
    with generator(tiny_folder, policy, backend=backend) as made:
        done = generate(made, requests(PROMPTS[:4], max_tokens=MAX_TOKENS))
    assert {name: completion.tokens for name, completion in done.items()}.items() <= expected(tiny_folder).items()
    experts_of_two_layers = 2 * spec.num_experts * spec.expert_parameters * 4
    assert streamed - kept > 0.9 * experts_of_two_layers


@pytest.mark.parametrize(("schedule", "model"), chosen(OF_MODELS, at=TWICE_EACH))
def test_layers_larger_than_the_gpu_stream_in_parts(tiny_folders, schedule, model):
    """In less memory than the experts of one layer take, and in as much as is planned."""
    folder = tiny_folders[model]
    spec = architecture(folder).spec
    choices = {"micro_batch_size": 1, "batch_size": 2, "kv_tokens_per_micro_batch": 64, "prefill_chunk_tokens": 4}
    choices |= {"prefix_buffer_tokens": 64, "resident_dense": False, "experts_per_part": 1}
    policy = policy_of(folder, schedule, choices)
    planned = plan_memory(spec, policy, machine()).gpu
    backend = emulated(machine(gpu_bytes=planned.planned_bytes, bandwidth=5e8))
    with generator(folder, policy, backend=backend) as made:
        done = generate(made, requests(PROMPTS[:4], max_tokens=MAX_TOKENS))
        peak = made.peak_bytes["gpu"]
    assert {name: completion.tokens for name, completion in done.items()}.items() <= expected(folder).items()
    expert = spec.expert_parameters * 4
    assert (
        peak[Purpose.EXPERT_SLOTS] == planned.purposes[Purpose.EXPERT_SLOTS] == 2 * expert < spec.num_experts * expert
    )
    assert Purpose.EXPERT_SLOTS not in plan_memory(spec, replace(policy, experts_per_part=0), machine()).gpu.purposes
