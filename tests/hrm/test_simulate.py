"""The simulator against a slow event-driven reference, and between its bounds."""

from collections import defaultdict
from random import Random

import pytest

from hrm.acts import NAMES
from hrm.policy import ScheduleName
from hrm.schedules import graph, iter_positions
from hrm.simulate import end_times, in_order, simulate
from hrm.tasks import Lane, Phase, Task, TaskGraph, TaskId
from tests.contracts.tasks import a_task, act
from tests.hrm.support import random_pipeline


def random_graph(rng: Random) -> tuple[Task, ...]:
    """Any tasks in any lanes that wait for any tasks before them."""
    lanes = rng.sample(list(Lane), rng.randint(1, len(Lane)))
    tasks: list[Task] = []
    for number in range(rng.randint(1, 60)):
        count = min(len(tasks), rng.choice([0, 0, 1, 1, 2, 5]))
        after = tuple(task.id for task in rng.sample(tasks, count))
        tasks.append(a_task(rng.choice(list(NAMES)), number, lane=rng.choice(lanes), after=after))
    return TaskGraph(tuple(tasks)).tasks


def schedule_graph(rng: Random) -> tuple[Task, ...]:
    return graph(random_pipeline(rng), rng.choice(list(ScheduleName))).tasks


def durations(tasks: tuple[Task, ...], rng: Random) -> dict[TaskId, float]:
    """Whole numbers, so that sums are exact and ties are common; some tasks take no time."""
    return {task.id: float(rng.choice([0, 1, 1, 2, 3, 10])) for task in tasks}


def run_event_by_event(
    tasks: tuple[Task, ...], seconds: dict[TaskId, float], hand_over: float = 0.0
) -> dict[TaskId, tuple[float, float]]:
    """Every lane is a queue: start what can start, then step to the next end or to when other lanes know of one."""
    queues: dict[Lane, list[Task]] = defaultdict(list)
    for task in tasks:
        queues[task.lane].append(task)
    running: dict[Lane, tuple[TaskId, float]] = {}
    spans: dict[TaskId, tuple[float, float]] = {}
    lane_of = {task.id: task.lane for task in tasks}
    now, done, known = 0.0, set[TaskId](), dict[TaskId, float]()

    def knows(lane: Lane, other: TaskId) -> bool:
        return other in done and (lane_of[other] is lane or known[other] <= now)

    while len(done) < len(tasks):
        for lane in [lane for lane, (_, end) in running.items() if end <= now]:
            done.add(ended := running.pop(lane)[0])
            known[ended] = now + hand_over
        startable = [
            lane
            for lane, queue in queues.items()
            if queue and lane not in running and all(knows(lane, other) for other in queue[0].after)
        ]
        for lane in startable:
            task = queues[lane].pop(0)
            spans[task.id] = (now, now + seconds[task.id])
            running[lane] = (task.id, now + seconds[task.id])
        if not startable:
            to_come = (*(end for _, end in running.values()), *known.values())
            now = min((time for time in to_come if time > now), default=now)
    return spans


def longest_path(tasks: tuple[Task, ...], seconds: dict[TaskId, float]) -> float:
    """The longest chain of waits and of neighbours in a lane, as an adjacency list from the end."""
    followers: dict[TaskId, set[TaskId]] = defaultdict(set)
    for number, task in enumerate(tasks):
        for other in task.after:
            followers[other].add(task.id)
        same_lane = (x.id for x in tasks[number + 1 :] if x.lane is task.lane)
        followers[task.id] |= set(list(same_lane)[:1])
    length: dict[TaskId, float] = {}
    for task in reversed(tasks):
        rest = max((length[x] for x in followers[task.id]), default=0.0)
        length[task.id] = seconds[task.id] + rest
    return max(length.values())


@pytest.mark.parametrize("make", [random_graph, schedule_graph])
def test_spans_are_those_of_the_event_driven_reference(make):
    for seed in range(150):
        rng = Random(seed)
        tasks = make(rng)
        seconds = durations(tasks, rng)
        for hand_over in (0.0, 1.0, 4.0):
            trace = simulate(tasks, lambda x, seconds=seconds: seconds[x], hand_over)
            assert [span.id for span in trace.spans] == [task.id for task in tasks]
            expected = run_event_by_event(tasks, seconds, hand_over)
            assert {s.id: (s.start_s, s.end_s) for s in trace.spans} == expected, seed


@pytest.mark.parametrize("make", [random_graph, schedule_graph])
def test_makespan_is_the_critical_path_between_the_busiest_lane_and_all_work(make):
    strictly_between = 0
    for seed in range(150):
        rng = Random(1000 + seed)
        tasks = make(rng)
        seconds = durations(tasks, rng)
        trace = simulate(tasks, lambda x, seconds=seconds: seconds[x])
        busy = trace.busy_s()
        assert max(busy.values()) <= trace.makespan_s <= sum(seconds.values())
        assert sum(busy.values()) == sum(seconds.values()) == sum(trace.seconds_by_kind().values())
        ends = max(span.end_s for span in trace.spans)
        assert ends == longest_path(tasks, seconds), seed
        strictly_between += max(busy.values()) < trace.makespan_s < sum(seconds.values())
    assert strictly_between > 50, "the bounds must not be trivial"


@pytest.mark.parametrize("make", [random_graph, schedule_graph])
def test_end_times_by_position_are_those_of_the_spans(make):
    for seed in range(100):
        rng = Random(seed)
        tasks = make(rng)
        of_kind = {name: float(rng.choice([0, 1, 2, 10])) for name in NAMES}
        position = {task.id: number for number, task in enumerate(tasks)}
        waits = [(t.id, [position[x] for x in t.after if x.act.lane is not t.lane]) for t in tasks]
        order = in_order(waits, lambda task: task.act.name)
        assert len(order.distinct) == len({task.id.act.name for task in tasks})
        for hand_over in (0.0, 3.0):
            ends = end_times(order, [of_kind[task.act.name] for task in order.distinct], hand_over)
            spans = simulate(tasks, lambda task, of_kind=of_kind: of_kind[task.act.name], hand_over).spans
            assert ends == [span.end_s for span in spans]


def test_an_order_ends_when_all_have_gone_through_the_layer_that_is_asked_for():
    asked = 0
    for seed in range(60):
        rng = Random(seed)
        pipeline, schedule = random_pipeline(rng), rng.choice(list(ScheduleName))
        tasks = list(iter_positions(pipeline, schedule))
        whole = in_order(tasks, lambda task: task.act.name)
        step, layer = until = rng.choice(sorted(whole.layer_ends))
        part = in_order(tasks, lambda task: task.act.name, until=until, micro_batches=pipeline.num_micro_batches)
        of_layer = [i for i, (x, _) in enumerate(tasks) if x.act.by_ffn and (x.step, x.layer) == (step, layer)]
        assert part.layer_ends[until] == whole.layer_ends[until] == of_layer[-1] == len(part.lanes) - 1, seed
        assert list(part.waits) == list(whole.waits)[: len(part.waits)]
        asked += len(part.lanes) < len(whole.lanes)
    assert asked > 30


def test_spans_carry_their_phase_and_seconds():
    task = Task(TaskId(act("LOAD_PAGE", phase=Phase.PREFILL), 3, 1))
    (span,) = simulate([task], lambda _: 2.0).spans
    assert (span.phase, span.seconds) == (Phase.PREFILL, 2.0)


def test_utilisation_is_the_busy_share_of_the_makespan():
    first = a_task("ATTENTION", lane=Lane.CPU)
    second = a_task("LOAD_HIDDEN", after=(first.id,))
    trace = simulate([first, second], lambda x: 3.0 if x == first.id else 1.0)
    assert trace.makespan_s == 4
    assert trace.utilisation() == {Lane.CPU: 0.75, Lane.H2D: 0.25}
