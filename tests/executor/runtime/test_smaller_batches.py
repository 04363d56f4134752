"""Batches of every size: what is predicted of each is what is run."""

from collections import Counter
from random import Random

import pytest

from executor.backends import make_backend
from executor.batching import pack
from executor.generate import AbstractGenerator, BatchResult, Planned
from executor.job.machine import predicted_seconds
from executor.null_generator import NullGenerator
from hrm.costs import Costs
from hrm.memory import plan_memory
from hrm.model_spec import ModelSpec
from hrm.phases import decode_work, prefill_work
from hrm.policy import Policy, ScheduleName
from hrm.policy_file import PolicyFile, profile_hash
from hrm.schedules import iter_tasks
from hrm.tasks import Phase
from hrm.workload import Workload
from tests.executor.runtime.support import CPU, GPU, architecture, emulated, generator, machine, make_policy, requests

PROMPT_LEN, GEN_LEN = 12, 4
WORKLOAD = Workload(name="test", prompt_len=PROMPT_LEN, max_prompt_len=PROMPT_LEN, gen_len=GEN_LEN)
# Four micro-batches of three, the last of two, and two of them with their cache on the GPU.
SPLIT = {"batch_size": 11, "micro_batch_size": 3, "gpu_kv_micro_batches": 2, "prefill_chunk_tokens": 36}
WAYS = {
    "attention on the CPU": {"attention": CPU},
    "attention on the GPU": {"attention": GPU},
    "whole layers": {"attention": GPU, "schedule": ScheduleName.FLEXGEN},
    "experts on the CPU": {"ffn": CPU, "resident": 1},
    "pages staged": {"attention": GPU, "staging": True, "resident_dense": False},
}
Counts = Counter[tuple[Phase, str]]


@pytest.fixture
def folder(tiny_folders):
    return tiny_folders["wide heads"]


def predicted(spec: ModelSpec, policy: Policy, num_requests: int) -> Counts:
    """The tasks of the graphs that the planner simulates of so many requests."""
    costs, smaller = Costs(spec, machine(), policy.formats), policy.for_batch(num_requests)
    works = (
        prefill_work(costs, smaller, WORKLOAD),
        decode_work(costs, smaller, PROMPT_LEN + GEN_LEN / 2, num_steps=GEN_LEN - 1),
    )
    return Counter(
        (work.pipeline.phase, task.id.act.name) for work in works for task in iter_tasks(work.pipeline, policy.schedule)
    )


def ran(result: BatchResult) -> Counts:
    assert result.decode is not None
    phases = {Phase.PREFILL: result.prefill, Phase.DECODE: result.decode}
    return Counter({(phase, kind): total.count for phase, of in phases.items() for kind, total in of.by_kind.items()})


def check_every_size(made: AbstractGenerator, policy: Policy) -> None:
    rng = Random(0)
    for count in range(1, policy.batch_size + 1):
        prompts = [rng.choices(range(made.arch.spec.vocab_size), k=PROMPT_LEN) for _ in range(count)]
        batch, waiting = pack(requests(prompts, max_tokens=GEN_LEN, ignore_eos=True), policy)
        assert not waiting
        # The planner's micro-batches are of the mean size: none has more than one request more than another.
        sizes = batch.micro_batch_sizes
        assert len(sizes) == policy.for_batch(count).num_micro_batches
        assert max(sizes) - min(sizes) <= 1
        assert ran(made.generate(batch)) == predicted(made.arch.spec, policy, count), count


@pytest.mark.parametrize("way", WAYS)
def test_slept_batches_have_the_tasks_that_are_predicted(folder, way):
    arch = architecture(folder)
    policy = make_policy(arch.spec.num_layers, **SPLIT, **WAYS[way])
    profile = machine()
    planned = Planned(policy, plan_memory(arch.spec, policy, profile))
    content = PolicyFile(
        policy=policy,
        memory_budget_bytes={"gpu": 10**9, "cpu": 10**9},
        model=arch.spec,
        workload=WORKLOAD,
        profile=profile,
        profile_hash=profile_hash(profile),
        predicted={},
    )
    with NullGenerator(make_backend("null", None), arch, planned, predicted_seconds(content, policy)) as made:
        check_every_size(made, policy)


@pytest.mark.parametrize("way", ["attention on the GPU", "pages staged"])
def test_batches_on_real_weights_have_the_tasks_that_are_predicted(folder, way):
    """Also where pages go through pinned buffers, which are as large as a whole batch's pages."""
    policy = make_policy(architecture(folder).spec.num_layers, **SPLIT, **WAYS[way])
    with generator(folder, policy, backend=emulated(machine())) as made:
        check_every_size(made, policy)
