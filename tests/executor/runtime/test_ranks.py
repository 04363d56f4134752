"""Tokens of several ranks equal those of transformers, whatever the policy and the schedule."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from executor.generate import Completion, Generator
from executor.group import Group
from hrm.buffers import Purpose
from hrm.layers import ExpertDivision
from hrm.parallel import tensor_parallel_obstacle
from hrm.policy import Policy
from tests.contracts.selection import chosen, covering
from tests.executor.group.threads import with_ranks
from tests.executor.runtime.fake_cuda import ACCELERATOR, installed
from tests.executor.runtime.support import GPU, architecture, generate, requests
from tests.executor.runtime.test_cuda import on_a_card
from tests.executor.runtime.test_parity import POLICIES, PROMPTS, SCHEDULES, facts_of_case, in_turn, policy_of
from tests.executor.runtime.test_parity import expected as continuations
from tests.executor.tiny_models import DBRX, MODELS

MAX_TOKENS = 3  # one step of decode after which another comes, and a last one


def tokens(made: Generator, _: Group, prompts: list[list[int]] = PROMPTS) -> dict[str, tuple[int, ...]]:
    return {name: done.tokens for name, done in generate(made, requests(prompts, max_tokens=MAX_TOKENS)).items()}


def expected(folder: Path, count: int = len(PROMPTS)) -> dict[str, tuple[int, ...]]:
    return {name: tokens[:MAX_TOKENS] for name, tokens in list(continuations(folder).items())[:count]}


CASES = in_turn(lambda index, _: (2, 4)[index % 6 == 2])
UNDIVIDED = "tied"  # none divides its 5 experts
OF_WHOLE_EXPERTS = in_turn(
    lambda index, model: 2 if model == DBRX else (4, 2)[index % 3 == 2],
    list(POLICIES)[::2],
    [model for model in MODELS if model != UNDIVIDED],
)


@pytest.mark.parametrize(
    ("name", "schedule", "model", "size", "accelerator"), chosen(CASES, at=covering(CASES, facts_of_case))
)
def test_greedy_tokens_of_ranks_equal_those_of_transformers(tiny_folders, name, schedule, model, size, accelerator):
    folder = tiny_folders[model]
    policy = policy_of(folder, schedule, POLICIES[name])
    for found in with_ranks(folder, policy, size, tokens, accelerator=accelerator):
        assert found == expected(folder)


def with_whole_experts(folder: Path, policy: Policy, ranks: int) -> Policy:
    """The same where each rank has whole experts, of which there are then fewer."""
    count = architecture(folder).spec.num_experts // ranks
    return replace(
        policy,
        expert_division=ExpertDivision.WHOLE,
        resident_experts=tuple(min(resident, count) for resident in policy.resident_experts),
        experts_per_part=min(policy.experts_per_part, count),
    )


@pytest.mark.parametrize(
    ("name", "schedule", "model", "size", "accelerator"),
    chosen(OF_WHOLE_EXPERTS, at=covering(OF_WHOLE_EXPERTS, facts_of_case)),
)
def test_greedy_tokens_of_ranks_with_whole_experts_equal_those_of_transformers(
    tiny_folders, name, schedule, model, size, accelerator
):
    """Of few tokens some choose none of a rank's; of other ranks' only the router is there."""
    folder = tiny_folders[model]
    policy = with_whole_experts(folder, policy_of(folder, schedule, POLICIES[name]), size)
    for found in with_ranks(folder, policy, size, tokens, accelerator=accelerator):
        assert found == expected(folder)


@pytest.mark.parametrize("division", ExpertDivision)
def test_ranks_allocate_what_is_planned(tiny_folders, division):
    """And it is full: what a rank has of the weights is exactly what there is room for."""
    folder = tiny_folders[MODELS[0]]
    policy = policy_of(folder, SCHEDULES[0], {"attention": GPU, "resident_experts": "ragged"})
    if division is ExpertDivision.WHOLE:
        policy = with_whole_experts(folder, policy, 4)

    def weights(made: Generator, _: Group) -> tuple[int, int]:
        held = made.memory.weights._places(one_head=False)
        gpu, cpu = made.plan.gpu.purposes, made.plan.cpu.purposes
        planned = gpu[Purpose.RESIDENT_WEIGHTS] + cpu[Purpose.WEIGHTS]
        assert made.plan.gpu.planned_bytes == sum(gpu.values())
        return sum(place.flat.nbytes for place in held), planned

    for held, planned in with_ranks(folder, policy, 4, weights):
        assert held == planned


@pytest.mark.parametrize(
    ("name", "division"),
    [
        ("all streamed, both on the gpu", ExpertDivision.INNER),
        ("kv split, cpu", ExpertDivision.INNER),
        ("kv split, cpu", ExpertDivision.WHOLE),
    ],
)
def test_ranks_on_one_card_sum_up_through_the_hosts_memory(tiny_folders, monkeypatch, name, division):
    """Which NCCL would refuse; on a card that is none, whose tensors are as strict as CUDA's."""
    monkeypatch.setattr("torch.distributed.ProcessGroupNCCL", lambda *_: pytest.fail("on one card"), raising=False)
    folder = tiny_folders[MODELS[0]]
    policy = policy_of(folder, SCHEDULES[0], POLICIES[name])
    if division is ExpertDivision.WHOLE:
        policy = with_whole_experts(folder, policy, 2)
    few = PROMPTS[:12]  # three micro-batches
    with installed((9, 0)):
        found = with_ranks(folder, policy, 2, partial(tokens, prompts=few), accelerator=ACCELERATOR)
    assert found == [expected(folder, len(few))] * 2


class TestOnACard:
    pytestmark = on_a_card

    @pytest.mark.parametrize(("index", "name"), list(enumerate(POLICIES)))
    def test_greedy_tokens_of_two_ranks_on_one_card(self, tiny_folders, index, name):
        folder = tiny_folders[MODELS[index % len(MODELS)]]
        policy = policy_of(folder, SCHEDULES[index % len(SCHEDULES)], POLICIES[name])
        assert with_ranks(folder, policy, 2, tokens, accelerator="cuda:0") == [expected(folder)] * 2


@pytest.mark.parametrize("model", chosen(MODELS, at=(0, 3, 4)))
def test_a_random_choice_and_its_logprobs_are_those_of_one_rank(tiny_folders, model):
    folder = tiny_folders[model]
    policy = policy_of(folder, SCHEDULES[0], {"attention": GPU})

    def choices(made: Generator, _: Group) -> dict[str, Completion]:
        return generate(made, requests(PROMPTS[:8], max_tokens=MAX_TOKENS, temperature=1.0, logprobs=True))

    (alone,) = with_ranks(folder, policy, 1, choices)
    spec = architecture(folder).spec
    ways = [(size, division) for size in (2, 4) for division in ExpertDivision]
    divided = [way for way in ways if not tensor_parallel_obstacle(spec, *way)]
    assert len(divided) >= 2
    for size, division in divided:
        ranks = with_ranks(folder, replace(policy, expert_division=division), size, choices)
        assert all(found == ranks[0] for found in ranks), "the same bits on all ranks"
        for name, done in ranks[0].items():
            assert done.tokens == alone[name].tokens
            assert done.logprobs == pytest.approx(alone[name].logprobs, abs=1e-5)
