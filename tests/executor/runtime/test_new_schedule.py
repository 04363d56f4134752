"""CONTRIBUTING's recipe for a schedule, as far as the executor goes: a new order gives the same tokens."""

import pytest

from executor.batching import Batcher
from hrm.policy import ScheduleName
from hrm.schedules import SCHEDULES, Schedule, add_schedule, bounds, orders
from tests.executor.runtime.support import CPU, GPU, architecture, generator, make_policy, requests
from tests.executor.tiny_models import random_prompts


def weights_last(p):
    """FlexGen's order with each layer's weights loaded only when the layer is reached."""
    held = []
    for task in orders.flexgen(p):
        if task.act.name == "LOAD_PAGE":
            held.append(task)
            continue
        if task.act.name == "PRE_ATTENTION" and held and held[0].layer == task.layer:
            yield from held
            held.clear()
        yield task


@pytest.mark.parametrize("device", [CPU, GPU])
def test_a_schedule_of_ones_own_gives_the_same_tokens(tiny_folders, device):
    mine = add_schedule("weights last", Schedule(weights_last, bounds.cgopipe))
    folder = tiny_folders["wide heads"]
    layers, prompts = architecture(folder).spec.num_layers, random_prompts(16, seed=3)
    tokens = []
    try:
        for schedule in (mine, ScheduleName.CGOPIPE):
            policy = make_policy(layers, attention=device, schedule=schedule, resident_dense=False)
            with generator(folder, policy) as made:
                (batch,) = Batcher(iter(requests(prompts, max_tokens=4, ignore_eos=True)), policy)
                tokens.append([completion.tokens for completion in made.generate(batch).completions])
    finally:
        del SCHEDULES[mine]
    assert tokens[0] == tokens[1]
