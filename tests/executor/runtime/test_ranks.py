"""Tokens of several ranks equal those of transformers, whatever the policy and the schedule."""

import pytest

from executor.generate import Completion, Generator
from executor.group import Group
from tests.executor.group.threads import with_ranks
from tests.executor.runtime.support import GPU, generate, requests
from tests.executor.runtime.test_parity import MAX_TOKENS, POLICIES, PROMPTS, SCHEDULES, expected, policy_of
from tests.executor.tiny_models import MODELS


def tokens(made: Generator, _: Group) -> dict[str, tuple[int, ...]]:
    return {name: done.tokens for name, done in generate(made, requests(PROMPTS, max_tokens=MAX_TOKENS)).items()}


@pytest.mark.parametrize(("index", "name"), list(enumerate(POLICIES)))
def test_greedy_tokens_of_ranks_equal_those_of_transformers(tiny_folders, index, name):
    """Policies, schedules, models and numbers of ranks take turns."""
    folder, size = tiny_folders[MODELS[index % len(MODELS)]], (2, 4)[index % 3 == 2]
    policy = policy_of(folder, SCHEDULES[index % len(SCHEDULES)], POLICIES[name])
    for found in with_ranks(folder, policy, size, tokens, is_emulated=index % 4 == 3):
        assert found == expected(folder)


def test_a_random_choice_and_its_logprobs_are_those_of_one_rank(tiny_folder):
    policy = policy_of(tiny_folder, SCHEDULES[0], {"attention": GPU})

    def choices(made: Generator, _: Group) -> dict[str, Completion]:
        return generate(made, requests(PROMPTS, max_tokens=MAX_TOKENS, temperature=1.0, logprobs=True))

    (alone,), two, four = (with_ranks(tiny_folder, policy, size, choices) for size in (1, 2, 4))
    for ranks in (two, four):
        assert all(found == ranks[0] for found in ranks), "the same bits on all ranks"
        for name, done in ranks[0].items():
            assert done.tokens == alone[name].tokens
            assert done.logprobs == pytest.approx(alone[name].logprobs, abs=1e-5)
