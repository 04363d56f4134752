"""Tokens of several pipeline stages equal those of transformers, whatever the policy, the schedule and the lengths."""

import pytest

from executor.generate import Generator
from tests.contracts.selection import chosen, covering
from tests.executor.group.threads import with_stages
from tests.executor.runtime.support import generate, make_policy, requests
from tests.executor.runtime.test_parity import (
    MAX_TOKENS,
    POLICIES,
    PROMPTS,
    expected,
    facts_of_case,
    in_turn,
    policy_of,
)
from tests.executor.tiny_models import save_tiny


def tokens(made: Generator) -> dict[str, tuple[int, ...]]:
    return {name: done.tokens for name, done in generate(made, requests(PROMPTS, max_tokens=MAX_TOKENS)).items()}


CASES = in_turn(lambda index, _: ((1, 2), (2, 1), (1, 1, 1))[index % 3])  # of the models' three layers


@pytest.mark.parametrize(
    ("name", "schedule", "model", "lengths", "accelerator"), chosen(CASES, at=covering(CASES, facts_of_case))
)
def test_greedy_tokens_of_stages_equal_those_of_transformers(tiny_folders, name, schedule, model, lengths, accelerator):
    """Policies, schedules, models, numbers of stages with their lengths, and accelerators take turns."""
    folder = tiny_folders[model]
    policy = policy_of(folder, schedule, POLICIES[name])
    for found in with_stages(folder, policy, lengths, tokens, is_emulated=accelerator == "emulated"):
        assert found == expected(folder)


@pytest.mark.parametrize("lengths", [(1, 3, 1), (2, 1, 2)])
def test_three_stages_of_unequal_lengths(tmp_path, lengths):
    """Each with its own resident experts."""
    folder = save_tiny("tied", tmp_path / "model", num_layers=5)
    policy = make_policy(5, batch_size=6, micro_batch_size=2, resident_experts=(0, 5, 3, 0, 4))
    for found in with_stages(folder, policy, lengths, tokens):
        assert found == expected(folder)
