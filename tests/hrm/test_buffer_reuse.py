"""No buffer is overwritten before its last reader is done, however long tasks take."""

from random import Random

import pytest

from hrm.policy import ScheduleName
from hrm.schedules import Pipeline, graph
from hrm.simulate import simulate
from hrm.tasks import Phase, Task, TaskId
from hrm.trace import Trace
from tests.hrm.buffers import Use, reason, unordered, uses, violations
from tests.hrm.support import random_pipeline

NUM_SCHEDULES = 1000
REUSED = ("slot", "part_slot", "ring", "kv_buffer", "qkv", "prefill_hidden", "prefill_kv")


def with_random_durations(tasks: tuple[Task, ...], rng: Random) -> Trace:
    """Mostly short, sometimes twenty times as long: the worst for whoever forgot to wait."""
    seconds = {task.id: rng.expovariate(1) ** 2 + 1e-9 for task in tasks}
    return simulate(tasks, lambda x: seconds[x])


def random_schedule(seed: int, phase: Phase | None = None) -> tuple[Pipeline, tuple[Task, ...]]:
    rng = Random(seed)
    pipeline = random_pipeline(rng, phase, most_ranks=2, most_parts=rng.choice([0, 3]))
    return pipeline, graph(pipeline, rng.choice(list(ScheduleName))).tasks


def without_edges(tasks: tuple[Task, ...], used: dict[TaskId, Use], buffer: str | None = None) -> tuple[Task, ...]:
    """The tasks without the edges that protect `buffer`, or any buffer, from being overwritten."""

    def kept(earlier: TaskId, later: TaskId) -> bool:
        why = reason(used, earlier, later)
        return why == "data" or (buffer is not None and why != buffer)

    return tuple(x._replace(after=tuple(y for y in x.after if kept(y, x.id))) for x in tasks)


def test_no_buffer_is_overwritten_in_a_thousand_random_schedules():
    for seed in range(NUM_SCHEDULES):
        pipeline, tasks = random_schedule(seed)
        broken = violations(uses(pipeline, tasks), with_random_durations(tasks, Random(seed)))
        assert not broken, (seed, pipeline, broken[0])


def test_edges_and_lanes_enforce_the_order_whatever_tasks_take():
    for seed in range(NUM_SCHEDULES, NUM_SCHEDULES + 500):
        pipeline, tasks = random_schedule(seed)
        missing = unordered(uses(pipeline, tasks), tasks)
        assert not missing, (seed, pipeline, missing[0])


def test_without_reuse_edges_the_same_schedules_do_overwrite():
    broken = 0
    for seed in range(200):
        pipeline, tasks = random_schedule(seed)
        used = uses(pipeline, tasks)
        bare = without_edges(tasks, used)
        broken += bool(violations(used, with_random_durations(bare, Random(seed))))
    assert broken > 50


@pytest.mark.parametrize("buffer", REUSED)
def test_every_kind_of_reuse_edge_is_needed(buffer):
    phase = Phase.PREFILL if buffer.startswith("prefill") else Phase.DECODE
    for seed in range(300):
        pipeline, tasks = random_schedule(seed, phase)
        used = uses(pipeline, tasks)
        bare = without_edges(tasks, used, buffer)
        found = violations(used, with_random_durations(bare, Random(seed)))
        if found:
            assert any(text.startswith(f"{buffer}:") for text in found)
            return
    pytest.fail(f"nothing overwrites a {buffer} without these edges")


def test_every_edge_has_a_reason():
    for seed in range(300):
        pipeline, tasks = random_schedule(seed)
        used = uses(pipeline, tasks)
        for task in tasks:
            for other in task.after:
                assert reason(used, other, task.id), f"{task.id} waits for {other} for no reason"
