"""Lanes that share cores, against a slow reference in fractions, and between two bounds."""

from collections import defaultdict
from dataclasses import dataclass
from fractions import Fraction
from random import Random

import pytest

from hrm.acts import ACTS, NAMES
from hrm.policy import ScheduleName
from hrm.schedules import graph
from hrm.shared_cores import SharedCores
from hrm.simulate import end_times, in_order, simulate
from hrm.tasks import Lane, Phase, Task, TaskGraph, TaskId
from tests.contracts.tasks import a_task
from tests.hrm.support import random_pipeline

SECONDS = (0, 1, 1, 2, 3, 10)
REDUCES = [act.name for act in ACTS[Phase.DECODE] if act.reduces]
CORES = (SharedCores(1, {Lane.GPU: 1, Lane.CPU: 1}), SharedCores(4, {Lane.GPU: 3, Lane.CPU: 2}))


def random_graph(rng: Random) -> tuple[Task, ...]:
    """Tasks in any lanes, most of which compute, some of which sum up, that wait for any tasks before them."""
    tasks: list[Task] = []
    for number in range(rng.randint(1, 50)):
        after = tuple(task.id for task in rng.sample(tasks, min(len(tasks), rng.choice([0, 0, 1, 2]))))
        lane = rng.choice([Lane.GPU, Lane.GPU, Lane.CPU, Lane.CPU, Lane.H2D, Lane.D2H])
        tasks.append(a_task(rng.choice(REDUCES if rng.random() < 0.2 else list(NAMES)), number, lane=lane, after=after))
    return TaskGraph(tuple(tasks)).tasks


def schedule_graph(rng: Random) -> tuple[Task, ...]:
    return graph(random_pipeline(rng), rng.choice(list(ScheduleName))).tasks


@dataclass
class UnderWay:
    task: Task
    left: Fraction
    speed: Fraction = Fraction(1)


def on_shared_cores(
    tasks: tuple[Task, ...], seconds: dict[TaskId, float], hand_over: int, shared: SharedCores
) -> dict[TaskId, tuple[Fraction, Fraction]]:
    """One clock for all: start what can start, share out the cores, and step to the next end or hand-over."""
    queues: dict[Lane, list[Task]] = defaultdict(list)
    for task in tasks:
        queues[task.lane].append(task)
    now, running = Fraction(0), dict[Lane, UnderWay]()
    starts, ends, lane_of = dict[TaskId, Fraction](), dict[TaskId, Fraction](), {x.id: x.lane for x in tasks}

    def may_start(task: Task) -> bool:
        return all(
            other in ends and (lane_of[other] is task.lane or ends[other] + hand_over <= now) for other in task.after
        )

    while len(ends) < len(tasks):
        ended = [lane for lane, one in running.items() if not one.left]
        for lane in ended:
            ends[running.pop(lane).task.id] = now
        started = [lane for lane, queue in queues.items() if queue and lane not in running and may_start(queue[0])]
        for lane in started:
            task = queues[lane].pop(0)
            starts[task.id], running[lane] = now, UnderWay(task, Fraction(seconds[task.id]))
        if ended or started:
            continue
        computing = {
            lane: one for lane, one in running.items() if lane.computes and not one.task.id.act.reduces and one.left
        }
        asked = sum(shared.threads[lane] for lane in computing)
        for lane, one in running.items():
            one.speed = min(Fraction(1), Fraction(shared.cores) / Fraction(asked)) if lane in computing else Fraction(1)
        known = [end + hand_over - now for end in ends.values() if end + hand_over > now]
        step = min(*(one.left / one.speed for one in running.values()), *known, Fraction(10**9))
        now += step
        for one in running.values():
            one.left -= step * one.speed
    return {task.id: (starts[task.id], ends[task.id]) for task in tasks}


@pytest.mark.parametrize("make", [random_graph, schedule_graph])
@pytest.mark.parametrize("shared", CORES, ids=["one core", "four cores"])
def test_spans_are_those_of_the_reference(make, shared):
    slowed = 0
    for seed in range(30):
        rng = Random(seed)
        tasks = make(rng)
        seconds = {task.id: float(rng.choice(SECONDS)) for task in tasks}
        for hand_over in (0, 1):
            trace = simulate(tasks, seconds.__getitem__, hand_over, shared)
            expected = on_shared_cores(tasks, seconds, hand_over, shared)
            assert [span.id for span in trace.spans] == [task.id for task in tasks]
            for span in trace.spans:
                assert (span.start_s, span.end_s) == pytest.approx(tuple(map(float, expected[span.id]))), seed
            slowed += any(span.seconds > seconds[span.id] * (1 + 1e-9) for span in trace.spans)
    assert slowed > 20, "tasks must compute at once"


@pytest.mark.parametrize("make", [random_graph, schedule_graph])
@pytest.mark.parametrize("shared", CORES, ids=["one core", "four cores"])
def test_sharing_makes_nothing_faster_and_nothing_slower_than_one_task_after_the_other(make, shared):
    strictly_between = 0
    for seed in range(100):
        rng = Random(1000 + seed)
        tasks = make(rng)
        seconds = {task.id: float(rng.choice(SECONDS)) for task in tasks}
        apart, together = simulate(tasks, seconds.__getitem__), simulate(tasks, seconds.__getitem__, shared=shared)
        computing = sum(seconds[x.id] * shared.threads[x.lane] for x in tasks if x.id.act.computes)
        least, most = max(apart.makespan_s, computing / shared.cores), sum(seconds.values())
        assert least <= together.makespan_s * (1 + 1e-12)
        assert together.makespan_s <= most * (1 + 1e-12)
        assert all(one.end_s <= other.end_s + 1e-9 for one, other in zip(apart.spans, together.spans, strict=True))
        strictly_between += apart.makespan_s * (1 + 1e-9) < together.makespan_s < most * (1 - 1e-9)
    assert strictly_between > 30, "the bounds must not be trivial"


def test_cores_enough_for_all_lanes_change_nothing():
    enough = SharedCores(2, {Lane.GPU: 1, Lane.CPU: 1})
    for seed in range(50):
        rng = Random(seed)
        tasks = random_graph(rng)
        seconds = {task.id: float(rng.choice(SECONDS)) for task in tasks}
        assert simulate(tasks, seconds.__getitem__, 1.0, enough) == simulate(tasks, seconds.__getitem__, 1.0)


def test_end_times_by_position_are_those_of_the_spans():
    for seed in range(60):
        rng = Random(seed)
        tasks = schedule_graph(rng)
        of_kind = {name: float(rng.choice(SECONDS)) for name in NAMES}
        position = {task.id: number for number, task in enumerate(tasks)}
        waits = [(t.id, [position[x] for x in t.after if x.act.lane is not t.lane]) for t in tasks]
        order = in_order(waits, lambda task: task.act.name)
        ends = end_times(order, [of_kind[task.act.name] for task in order.distinct], 1.0, CORES[0])
        spans = simulate(tasks, lambda task, of_kind=of_kind: of_kind[task.act.name], 1.0, CORES[0]).spans
        assert ends == [span.end_s for span in spans]
