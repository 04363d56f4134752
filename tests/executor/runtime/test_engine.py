"""The loop itself: order, edges, failures, Ctrl-C; on handlers that sleep or raise."""

import _thread
import gc
import os
import signal
import threading
import time
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise, zip_longest

import pytest

from executor.backends.null import null_handlers
from executor.engine import MOST_PENDING, Engine, TaskFailedError
from hrm.acts import ACTS, NAMES
from hrm.contract.pacing import PacedCopy, Waits
from hrm.policy import ScheduleName
from hrm.schedules import Pipeline, iter_tasks
from hrm.simulate import simulate
from hrm.tasks import Device, Lane, Phase, Task, TaskId
from tests.contracts.tasks import a_task, act

CPU_DECODE = Pipeline(
    num_layers=3,
    num_micro_batches=3,
    num_steps=2,
    attention=Device.CPU,
    kv_on_gpu=(False, False, True),
    streamed=(True,) * 3,
    cpu_experts=(False, True, True),
    dense_pages=1,
    staging=True,
)
GPU_DECODE = replace(CPU_DECODE, attention=Device.GPU, kv_on_gpu=(True, False, False))
PREFILL = replace(CPU_DECODE, phase=Phase.PREFILL, kv_on_gpu=(False,) * 3, cpu_experts=(False,) * 3, num_steps=1)
PIPELINES = {
    "cpu": CPU_DECODE,
    "gpu": GPU_DECODE,
    "prefill": PREFILL,
    "a rank's": replace(CPU_DECODE, ranks=2),
    "a rank's prefill": replace(PREFILL, ranks=2),
    "in parts": replace(GPU_DECODE, cpu_experts=(False,) * 3, parts=(2,) * 3),
}


def no_setup(lane: Lane) -> None:
    del lane


def seconds_of(task: TaskId) -> float:
    return {act("ATTENTION"): 2e-3, act("POST_ATTENTION"): 1.5e-3}.get(task.act, 5e-4)


@pytest.fixture
def engine():
    with Engine(no_setup) as started:
        yield started


def within(seconds: float, work):
    """Run `work` in a thread and fail if it takes longer: a hang must not stop the suite."""
    outcome: list = []

    def call() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # noqa: BLE001
            outcome.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "hangs"
    return outcome[0]


@pytest.mark.parametrize("schedule", ScheduleName)
@pytest.mark.parametrize("pipeline", PIPELINES.values(), ids=PIPELINES)
def test_null_run_keeps_order_and_edges_and_sleeps_no_shorter_than_simulated(engine, pipeline, schedule):
    tasks = list(iter_tasks(pipeline, schedule))
    result = engine.run(tasks, null_handlers(seconds_of))
    spans = {span.id: span for span in result.spans}
    assert spans.keys() == {task.id for task in tasks}
    order = defaultdict(list)
    for task in tasks:
        order[task.lane].append(task.id)
        assert all(spans[other].end_s <= spans[task.id].start_s for other in task.after)
    for lane, issued in order.items():
        ran = sorted((s for s in result.spans if s.lane is lane), key=lambda s: s.start_s)
        assert [span.id for span in ran] == issued
        assert all(a.end_s <= b.start_s for a, b in pairwise(ran))
    simulated = simulate(tasks, seconds_of)
    for lane, busy_s in simulated.busy_s().items():
        assert result.busy_s[lane] >= busy_s * (1 - 1e-9)
    assert sum(total.count for total in result.by_kind.values()) == len(tasks)


@pytest.mark.parametrize("name", NAMES)
def test_failure_in_any_kind_of_task_stops_the_run_and_names_it(engine, name):
    pipeline = next(
        p for p in PIPELINES.values() if any(task.id.act.name == name for task in iter_tasks(p, ScheduleName.CGOPIPE))
    )
    handlers = null_handlers(seconds_of)

    def fail(task: Task) -> int:
        raise OSError(f"injected into {task.id}")

    handlers = {act: fail if act.name == name else handler for act, handler in handlers.items()}
    tasks = iter_tasks(replace(pipeline, num_steps=pipeline.num_steps), ScheduleName.CGOPIPE)
    error = within(20, lambda: engine.run(tasks, handlers))
    assert isinstance(error, TaskFailedError)
    assert error.task.id.act.name == name
    assert str(error.task.id) in str(error)
    assert f"lane {error.task.lane}" in str(error)
    assert "injected" in str(error)
    row = next(r for r in error.chart.splitlines() if r.strip().startswith(error.task.lane.value))
    assert "!" in row
    # The engine can be used again, so no lane is stuck.
    again = within(20, lambda: engine.run([a_task(name)], {act(name): lambda _: 0}))
    assert again.by_kind[name].count == 1


def test_lanes_stop_at_once_after_a_failure(engine):
    ran: list[TaskId] = []

    def handle(task: Task) -> int:
        if task.id.layer == 0:
            raise ValueError("first")
        ran.append(task.id)
        return 0

    first = TaskId(act("LOAD_PAGE"), 0, 0)
    others = [a_task("LOAD_PAGE", i, 0, lane=Lane.GPU, after=(first,)) for i in range(1, 5000)]
    with pytest.raises(TaskFailedError):
        engine.run([Task(first), *others], {act("LOAD_PAGE"): handle, act("LOAD_PAGE", Lane.GPU): handle})
    assert ran == []


def test_error_while_the_graph_is_made_ends_the_run(engine):
    def tasks():
        yield a_task("EMBED", 0, 0, lane=Lane.H2D)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        engine.run(tasks(), {act("EMBED"): lambda _: 0})


@pytest.mark.parametrize(("at", "length"), [(4, MOST_PENDING), (40, 100 * MOST_PENDING)], ids=["draining", "feeding"])
def test_ctrl_c_ends_the_run(engine, no_collection, at, length):
    ran = 0

    def handle(task: Task) -> int:
        nonlocal ran
        ran += 1
        if task.id.step == at:
            _thread.interrupt_main()
        time.sleep(5e-3)
        return 0

    graph = (a_task("SAMPLE", 0, 0, step, lane=Lane.GPU) for step in range(length))
    with pytest.raises(KeyboardInterrupt):
        engine.run(graph, {act("SAMPLE"): handle})
    assert at < ran < MOST_PENDING


DAYS = 1e6


def slow_transfer(waits):
    """A handler that moves a byte over a link that takes days for it."""
    link = PacedCopy(latency_s=0.0, bandwidth_bytes_per_s=1 / DAYS, sleep=waits.sleep)

    def handle(_: Task) -> int:
        link.run(lambda: None, 1)
        return 1

    return handle


def slow_task(waits):
    return null_handlers(lambda _: DAYS, waits.sleep)[act("LOAD_PAGE")]


@pytest.mark.parametrize("slow", [slow_transfer, slow_task])
def test_ctrl_c_does_not_wait_for_a_transfer_under_way(no_collection, slow):
    waits = Waits()
    page = a_task("LOAD_PAGE", 0, 0, lane=Lane.H2D)
    # A signal, unlike `_thread.interrupt_main`, also wakes who waits for a lock.
    timer = threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT])

    def handle(task: Task) -> int:
        timer.start()
        return slow(waits)(task)

    with Engine(no_setup, waits=waits) as engine:
        with pytest.raises(KeyboardInterrupt):
            engine.run([page], {act("LOAD_PAGE"): handle})
        assert engine.run([page], {act("LOAD_PAGE"): lambda _: 7}).moved_bytes == {Lane.H2D: 7}
    timer.join()


def test_a_failure_does_not_wait_for_a_transfer_under_way():
    waits, under_way = Waits(), threading.Event()
    tasks = [a_task("LOAD_PAGE", 0, 0, lane=Lane.H2D), a_task("SAMPLE", 0, 0, lane=Lane.GPU)]

    def load(task: Task) -> int:
        under_way.set()
        return slow_transfer(waits)(task)

    def fail(_: Task) -> int:
        assert under_way.wait(20)
        raise ZeroDivisionError

    def run():
        with Engine(no_setup, waits=waits) as engine:
            engine.run(tasks, {act("LOAD_PAGE"): load, act("SAMPLE"): fail})

    error = within(20, run)
    assert isinstance(error, TaskFailedError)
    assert isinstance(error.error, ZeroDivisionError)
    assert error.task == tasks[1]


def test_long_graph_is_never_held(engine):
    made = ended = most = 0

    def tasks():
        nonlocal made, most
        for step in range(5000):
            made += 1
            most = max(most, made - ended)
            yield a_task("SAMPLE", 0, 0, step, lane=Lane.GPU)

    def handle(_: Task) -> int:
        nonlocal ended
        ended += 1
        return 0

    engine.run(tasks(), {act("SAMPLE"): handle})
    assert ended == 5000
    assert most <= MOST_PENDING + 2


def test_finished_ends_a_run_early(engine):
    count = 0

    def handle(_: Task) -> int:
        nonlocal count
        count += 1
        return 0

    tasks = (a_task("SAMPLE", 0, 0, step, lane=Lane.GPU) for step in range(10**6))
    engine.run(tasks, {act("SAMPLE"): handle}, finished=lambda: count >= 100)
    assert 100 <= count <= 100 + MOST_PENDING


def test_only_the_first_steps_are_kept_but_all_are_counted(engine):
    tasks = [a_task("SAMPLE", 0, 0, step, lane=Lane.GPU) for step in range(10)]
    result = engine.run(tasks, {act("SAMPLE"): lambda _: 3}, kept_steps=4)
    assert [span.id.step for span in result.spans] == [0, 1, 2, 3]
    assert result.spans_left_out == 6
    assert result.by_kind["SAMPLE"].num_bytes == 30


def test_steps_take_the_whole_time_and_bytes_are_counted_by_lane(engine):
    pipeline = replace(CPU_DECODE, num_steps=4)
    handlers = null_handlers(seconds_of)
    moved = {act("LOAD_PAGE"): 100, act("OFFLOAD_QKV"): 7}
    counted = {
        kind: (lambda task, handler=handler: handler(task) or moved.get(task.id.act, 0))
        for kind, handler in handlers.items()
    }
    result = engine.run(iter_tasks(pipeline, ScheduleName.CGOPIPE), counted)
    assert len(result.step_s) == pipeline.num_steps
    assert min(result.step_s) > 0
    chosen_s = max(span.end_s for span in result.spans if span.lane is Lane.GPU)
    assert result.start_s + sum(result.step_s) == pytest.approx(chosen_s, rel=1e-9)
    loads, offloads = (result.by_kind[act.name].count for act in moved)
    assert result.moved_bytes == {Lane.H2D: 100 * loads, Lane.D2H: 7 * offloads}


def test_full_collections_pass_over_what_was_there_until_the_lanes_end():
    there = [[]]
    with Engine(no_setup):
        assert not any(one is there for one in gc.get_objects())
        made = [[]]
        assert any(one is made for one in gc.get_objects())
    assert any(one is there for one in gc.get_objects())


def test_one_run_may_mix_tasks_of_both_phases(engine):
    """A handler is looked up by its act, so the same kind of task does other work in the other phase."""
    graphs = [list(iter_tasks(pipeline, ScheduleName.CGOPIPE)) for pipeline in (PREFILL, CPU_DECODE)]
    mixed = [task for pair in zip_longest(*graphs) for task in pair if task is not None]
    done: dict[Phase, set[TaskId]] = {phase: set() for phase in Phase}

    def of(phase: Phase):
        def handle(task: Task) -> int:
            done[phase].add(task.id)
            return 1

        return handle

    handlers = {act: of(phase) for phase, acts in ACTS.items() for act in acts}
    result = engine.run(mixed, handlers)
    assert done == {Phase.PREFILL: {task.id for task in graphs[0]}, Phase.DECODE: {task.id for task in graphs[1]}}
    spans = {span.id: span for span in result.spans}
    for task in mixed:
        assert spans[task.id].phase is task.id.phase
        assert all(spans[other].end_s <= spans[task.id].start_s for other in task.after)
    assert [span.id for span in simulate(mixed, lambda _: 1.0).spans] == [task.id for task in mixed]


def test_a_task_is_told_when_it_could_have_begun_had_its_lane_been_free():
    """An emulated link goes by that: a device's would not idle until a thread of the host's is awake."""
    waits, at, told, submitted = Waits(), dict[str, float](), list[float | None](), threading.Event()

    def graph():
        work = a_task("SAMPLE", lane=Lane.GPU)
        yield from (a_task("LOAD_PAGE", lane=Lane.H2D), work, a_task("LOAD_HIDDEN", lane=Lane.H2D, after=(work.id,)))
        submitted.set()

    def long_page(_: Task) -> int:
        submitted.wait()
        while not engine.count(act("SAMPLE")):
            time.sleep(1e-4)
        at["the lane is free"] = time.perf_counter()
        return 0

    def sample(_: Task) -> int:
        at["the other begins"] = time.perf_counter()
        return 0

    def load_hidden(_: Task) -> int:
        told.append(waits.ready_s)
        return 0

    with Engine(no_setup, waits=waits) as engine:
        engine.run(graph(), {act("LOAD_PAGE"): long_page, act("SAMPLE"): sample, act("LOAD_HIDDEN"): load_hidden})
    assert waits.ready_s is None  # of this thread, which is no lane
    assert told[0] is not None
    assert at["the other begins"] <= told[0] <= at["the lane is free"]
