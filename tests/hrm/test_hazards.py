"""Edges that follow from what tasks touch, against those written by hand for every kind of task."""

from collections import Counter
from collections.abc import Iterable
from random import Random

import pytest

from hrm.policy import ScheduleName
from hrm.schedules import Pipeline, iter_positions, iter_tasks
from hrm.simulate import end_times, in_order, simulate
from hrm.tasks import Device, Lane, Task, TaskId
from tests.hrm.edges_by_hand import ByHand
from tests.hrm.support import random_pipeline

CASES = 1000


def by_hand(pipeline: Pipeline, tasks: Iterable[Task]) -> tuple[Task, ...]:
    hand = ByHand(pipeline)
    return tuple(Task(task.id, hand.waits(task.id)) for task in tasks)


def num_waits_between_lanes(tasks: Iterable[Task]) -> int:
    return sum(other.act.lane is not task.lane for task in tasks for other in task.after)


@pytest.fixture(scope="module")
def cases() -> list[tuple[Random, tuple[Task, ...], tuple[Task, ...]]]:
    made = []
    for seed in range(CASES):
        rng = Random(seed)
        pipeline = random_pipeline(rng)
        tasks = tuple(iter_tasks(pipeline, rng.choice(list(ScheduleName))))
        made.append((rng, tasks, by_hand(pipeline, tasks)))
    return made


def test_every_task_ends_when_it_does_with_edges_by_hand(cases):
    for seed, (rng, tasks, oracle) in enumerate(cases):
        seconds = {task.id: rng.expovariate(1) ** 2 + 1e-9 for task in tasks}
        ends, expected = ([s.end_s for s in simulate(each, seconds.__getitem__).spans] for each in (tasks, oracle))
        assert ends == expected, seed


def test_positions_waited_for_make_tasks_end_when_edges_do():
    for seed in range(200):
        rng = Random(seed)
        pipeline, schedule = random_pipeline(rng), rng.choice(list(ScheduleName))
        seconds = [rng.expovariate(1) ** 2 for _ in iter_tasks(pipeline, schedule)]
        order = in_order(iter_positions(pipeline, schedule), lambda task: task)
        of_task = dict(zip(order.distinct, seconds, strict=True))
        spans = simulate(iter_tasks(pipeline, schedule), of_task.__getitem__).spans
        assert end_times(order, seconds) == [span.end_s for span in spans], seed


def test_lanes_wait_for_one_another_no_more_often_than_with_edges_by_hand(cases):
    ours, theirs = Counter(), Counter()
    for seed, (_, tasks, oracle) in enumerate(cases):
        ours[seed], theirs[seed] = num_waits_between_lanes(tasks), num_waits_between_lanes(oracle)
        assert ours[seed] <= theirs[seed], seed
    assert ours.total() < 0.95 * theirs.total(), (ours.total(), theirs.total())


def test_no_wait_follows_from_others(cases):
    """Without any one edge some task could start before what it waited for has ended."""
    for _, tasks, _ in cases[:200]:
        ended: dict[TaskId, dict[Lane, int]] = {}  # of each lane the last position that must have ended
        last: dict[Lane, dict[Lane, int]] = {lane: {} for lane in Lane}
        position = {task.id: number for number, task in enumerate(tasks)}
        for task in tasks:
            for other in task.after:
                known = [last[task.lane], *(ended[x] for x in task.after if x != other)]
                reached = max(before.get(other.act.lane, -1) for before in known)
                assert other.act.lane is not task.lane
                assert reached < position[other], f"{task.id} need not wait for {other}"
            merged = [last[task.lane], *(ended[x] for x in task.after)]
            now = {lane: max(before.get(lane, -1) for before in merged) for lane in Lane}
            now[task.lane] = position[task.id]
            ended[task.id] = last[task.lane] = now


def test_work_per_task_does_not_grow_with_the_number_of_micro_batches():
    """Counted in the parts that tasks touch, of a cache that streams: a search of earlier loads would grow with it."""

    def parts_a_task(n: int) -> float:
        pipeline = Pipeline(
            num_layers=2,
            num_micro_batches=n,
            num_steps=2,
            attention=Device.GPU,
            kv_on_gpu=(False,) * n,
            streamed=(True, True),
            cpu_experts=(False, False),
            num_pages=n,
        )
        tasks = list(iter_tasks(pipeline, ScheduleName.CGOPIPE))
        return sum(len(task.touch[0]) + len(task.touch[1]) + len(task.after) for task in tasks) / len(tasks)

    assert parts_a_task(300) == pytest.approx(parts_a_task(30), rel=0.1)
