"""Tokens of several pipeline stages equal those of transformers, whatever the policy and the schedule."""

import pytest

from executor.generate import Generator
from tests.executor.group.threads import with_stages
from tests.executor.runtime.support import generate, requests
from tests.executor.runtime.test_parity import MAX_TOKENS, POLICIES, PROMPTS, SCHEDULES, expected, policy_of
from tests.executor.tiny_models import MODELS


def tokens(made: Generator) -> dict[str, tuple[int, ...]]:
    return {name: done.tokens for name, done in generate(made, requests(PROMPTS, max_tokens=MAX_TOKENS)).items()}


@pytest.mark.parametrize(("index", "name"), list(enumerate(POLICIES)))
def test_greedy_tokens_of_stages_equal_those_of_transformers(tiny_folders, index, name):
    """Policies, schedules, models and numbers of stages take turns."""
    folder, size = tiny_folders[MODELS[index % len(MODELS)]], (2, 3)[index % 3 == 2]
    policy = policy_of(folder, SCHEDULES[index % len(SCHEDULES)], POLICIES[name])
    for found in with_stages(folder, policy, size, tokens, is_emulated=index % 4 == 3):
        assert found == expected(folder)
