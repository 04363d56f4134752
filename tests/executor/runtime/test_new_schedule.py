"""CONTRIBUTING's recipes for a schedule and an act, as far as the executor goes: the same tokens in a new order."""

import pytest

from executor.batching import Batcher
from executor.cli import main as run_executor
from executor.handlers import DecodeHandlers, add_handler
from executor.handlers.added import HANDLERS
from hrm.acts import ACTS, NAMES, add_act, decode
from hrm.cli import main as run_hrm
from hrm.policy import ScheduleName
from hrm.schedules import SCHEDULES, Schedule, add_schedule, bounds, orders
from hrm.tasks import Act, Lane, Phase
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


CHECK = Act(
    letter="G",
    name="CHECK_HIDDEN",
    words="a look at hidden states",
    phase=Phase.DECODE,
    lane=Lane.D2H,
    touches=lambda p, x: (((decode.HIDDEN, x.index, x.step * (p.num_layers + 1) + x.layer + 1, 0),), ()),
    count=lambda c: c.layers * c.pieces,
    moves=lambda x: 4 * x.tokens,
    seconds=lambda _, __: 1e-5,
)


@pytest.fixture
def checked(monkeypatch):
    """A schedule that has hidden states looked at, as acts, handlers and schedules are added from outside."""
    looked: list[bool] = []

    def handler(handlers: DecodeHandlers):
        def look(_, rows, span):
            hidden = handlers.memory.gpu.hidden_ND[span]
            looked.append(bool(hidden.isfinite().all()))
            return 4 * len(rows.sequences)

        return handlers.on_rows(look)

    def order(p):
        for task in orders.cgopipe(p):
            yield task
            if task.act is decode.POST_ATTENTION:
                yield task._replace(act=CHECK)

    monkeypatch.setitem(ACTS, Phase.DECODE, ACTS[Phase.DECODE])
    monkeypatch.setitem(NAMES, CHECK.name, CHECK.letter)
    add_act(CHECK)
    monkeypatch.setitem(HANDLERS, CHECK, handler)
    add_handler(CHECK, handler)
    name = add_schedule("checked", Schedule(order, bounds.cgopipe))
    yield looked
    del SCHEDULES[name]


def test_an_act_of_ones_own_runs_in_a_job_and_is_validated(run, tmp_path, checked, capsys):
    lines = [line(f"r{index}", prompt) for index, prompt in enumerate(PROMPTS[:5])]
    _, plain = run(lines, output="plain")
    _, there = run(lines, "--schedule", "checked", output="checked")
    assert {name: tokens_of(item) for name, item in there.items()} == {
        name: tokens_of(item) for name, item in plain.items()
    }
    assert checked
    assert all(checked)
    run_hrm(["validate", str(tmp_path / "checked")])
    assert "G check hidden" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_executor(["bench", "--model", "x", "--schedules", "checkd"])
    assert "--schedules is 'checkd'" in capsys.readouterr().err
