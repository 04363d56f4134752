"""CONTRIBUTING's recipes for a schedule and for an act, followed from outside: no module of ours is touched."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from random import Random

import msgspec
import pytest

from hrm.acts import ACTS, act_named, decode
from hrm.closed_form import DecodeStep, Point
from hrm.costs import Costs
from hrm.estimate import estimate
from hrm.phases import decode_work, simulate_work
from hrm.plots.timeline import plot_timeline
from hrm.policy import Policy, ScheduleName
from hrm.policy_file import load_policy_file
from hrm.schedules import SCHEDULES, Pipeline, Schedule, StepWork, add_schedule, decode_pipeline, graph, iter_tasks
from hrm.schedules.bounds import Terms
from hrm.search import Space, search
from hrm.simulate import simulate
from hrm.tasks import Lane, Phase, TaskId
from hrm.workload import Workload
from tests.contracts.added_act import CHECK, CHECK_S, checked
from tests.hrm.support import machine, tiny_spec
from tests.hrm.test_memory import a_policy

pytestmark = pytest.mark.usefixtures("rough_bounds")

WORKLOAD = Workload(name="test", prompt_len=40, max_prompt_len=60, gen_len=9)
SPEC = tiny_spec()


def one_by_one(p: Pipeline) -> Iterator[TaskId]:
    """Every micro-batch through a whole layer before the next one is begun, and nothing loaded ahead."""
    for t, i in product(range(p.num_steps), range(p.num_layers)):
        yield from p.load_pages((t, i))
        for j in range(p.num_micro_batches):
            yield from p.prefetch_kv(t, i, j)
            yield from p.embed(t, i, j)
            yield from p.before_attention(t, i, j)
            yield from p.attend(t, i, j)
            yield from p.load_hidden(t, i, j)
            yield from p.after_attention(t, i, j)
            yield from p.finish_layer(t, i, j)


def attention_in_turn(step: StepWork) -> Terms:
    """A micro-batch's attention on the CPU is waited for before the next one's projections."""
    return (step.cpu_attention * step.gpu_s + step.cpu_s,)


@pytest.fixture
def mine():
    name = add_schedule("one-by-one", Schedule(one_by_one, attention_in_turn))
    yield name
    del SCHEDULES[name]


@pytest.fixture
def small_machine():
    return machine(gpu_bytes=1e6, cpu_bytes=1e8, gpu_flops=1e11, link=1e8, latency_s=1e-5, launch_s=1e-6)


def test_a_schedule_of_ones_own_is_searched_for_simulated_and_drawn(mine, small_machine, tmp_path):
    found = search(Space(SPEC, small_machine, WORKLOAD, schedule=mine)).best
    assert found is not None
    assert found.policy.schedule is mine
    assert found.tokens_per_s <= found.bound_tokens_per_s * (1 + 1e-9)
    as_cgopipe = replace(found.policy, schedule=ScheduleName.CGOPIPE)
    assert found.tokens_per_s < estimate(SPEC, as_cgopipe, small_machine, WORKLOAD).tokens_per_s
    work = decode_work(Costs(SPEC, small_machine, found.policy.formats), found.policy, 45.0, num_steps=2)
    trace = simulate_work(work)
    assert {span.id for span in trace.spans} == {task.id for task in iter_tasks(work.pipeline, mine)}
    plot_timeline({"mine": trace}, tmp_path / "mine.png")
    assert (tmp_path / "mine.png").stat().st_size > 0


def test_its_name_is_kept_in_files_and_a_name_that_nobody_added_is_none(mine):
    policy = replace(a_policy(Random(5), SPEC), schedule=mine)
    assert msgspec.json.decode(msgspec.json.encode(policy), type=Policy) == policy
    assert mine not in list(ScheduleName)  # what is listed is ours
    with pytest.raises(ValueError, match="nobody's"):
        ScheduleName("nobody's")


def test_its_name_goes_with_every_command(mine, hrm, tmp_path):
    path = tmp_path / "policy.json"
    words = ("--model", "qwen3-30b-a3b", "--gpus", "1xL4", "-u", "4", "-n", "2", "--requests", "8", "--out", path)
    assert hrm("estimate", *words, "--schedule", mine.value)[0] == 0
    assert load_policy_file(path).policy.schedule is mine
    code, out, err = hrm("simulate", "--policy", path, "--steps", "1", "--layers", "1")
    assert (code, err) == (0, "")
    assert mine.value in out
    code, _, err = hrm("estimate", *words, "--schedule", "one-by-two")
    assert code == 2
    assert "--schedule is 'one-by-two': must be one of cgopipe, " in err


# -- an act -----------------------------------------------------------------------------------


@pytest.fixture
def with_check(monkeypatch):
    with checked(monkeypatch, one_by_one, attention_in_turn) as name:
        yield name


def test_an_act_of_ones_own_is_waited_for_and_counted_everywhere(with_check, small_machine, tmp_path, monkeypatch):
    policy = replace(a_policy(Random(5), SPEC), schedule=with_check)
    tasks = {task.id: task for task in graph(decode_pipeline(SPEC, policy, num_steps=2), with_check).tasks}
    for task in tasks.values():
        if task.id.act is CHECK:
            assert task.after == (task.id._replace(act=decode.POST_ATTENTION),)
    # Whoever overwrites the hidden states waits until they are summed, however long that takes.
    spans = {span.id: span for span in simulate(tasks.values(), lambda x: 1.0 if x.act is CHECK else 1e-6).spans}
    for layer in range(1, SPEC.num_layers):
        overwriting = spans[TaskId(decode.POST_ATTENTION, layer, 0)]
        assert overwriting.start_s >= spans[TaskId(CHECK, layer - 1, 0)].end_s
    costs = Costs(SPEC, small_machine, policy.formats)

    def d2h_s() -> float:
        step = DecodeStep.of_point(costs, Point.of_policy(policy, SPEC), with_check).seconds(45.0)
        return float(step.lanes[Lane.D2H])

    added = SPEC.num_layers * policy.num_micro_batches * CHECK_S
    counted = d2h_s()
    with monkeypatch.context() as without:
        without.setitem(ACTS, Phase.DECODE, decode.ALL)
        assert counted - d2h_s() == pytest.approx(added)
    trace = simulate_work(decode_work(costs, policy, 45.0, num_steps=1))
    assert trace.seconds_by_kind()["CHECK_HIDDEN"] == pytest.approx(added)
    assert act_named(Phase.DECODE, "CHECK_HIDDEN", Lane.D2H) is CHECK
    plot_timeline({"checked": trace}, tmp_path / "checked.png")
