"""CONTRIBUTING's recipes for a schedule and an act, as far as the executor goes: the same tokens in a new order."""

import pytest

from executor.batching import Batcher
from executor.cli import main as run_executor
from executor.handlers import DecodeHandlers, add_handler
from executor.handlers.added import HANDLERS
from hrm.cli import main as run_hrm
from hrm.policy import ScheduleName
from hrm.schedules import SCHEDULES, Schedule, add_schedule, bounds, orders
from tests.contracts.added_act import CHECK, CHECK_BYTES, checked
from tests.executor.runtime.jobs import PROMPTS, line, tokens_of
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


@pytest.fixture
def looked(monkeypatch):
    """What is seen of hidden states under a schedule that has them looked at, by a handler added from outside."""
    seen: list[bool] = []

    def handler(handlers: DecodeHandlers):
        def look(_, rows, span):
            hidden = handlers.memory.gpu.hidden_ND[span]
            seen.append(bool(hidden.isfinite().all()))
            return CHECK_BYTES * len(rows.sequences)

        return handlers.on_rows(look)

    monkeypatch.setitem(HANDLERS, CHECK, handler)
    add_handler(CHECK, handler)
    with checked(monkeypatch, orders.cgopipe, bounds.cgopipe):
        yield seen


def test_an_act_of_ones_own_runs_in_a_job_and_is_validated(run, tmp_path, looked, capsys):
    lines = [line(f"r{index}", prompt) for index, prompt in enumerate(PROMPTS[:5])]
    _, plain = run(lines, output="plain")
    _, there = run(lines, "--schedule", "checked", output="checked")
    assert {name: tokens_of(item) for name, item in there.items()} == {
        name: tokens_of(item) for name, item in plain.items()
    }
    assert looked
    assert all(looked)
    run_hrm(["validate", str(tmp_path / "checked")])
    assert "G check hidden" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_executor(["bench", "--model", "x", "--schedules", "checkd"])
    assert "--schedules is 'checkd'" in capsys.readouterr().err
