"""Lanes that queue their tasks on a device: order, edges, times, back-pressure, late failures."""

import threading
import time

import pytest

from executor.engine import MOST_PENDING, SYNCHRONISE, Engine, TaskFailedError
from executor.lanes import QUEUED_LAYERS, QUEUED_TASKS
from hrm.policy import ScheduleName
from hrm.schedules import iter_tasks
from hrm.tasks import Lane, Task, TaskId
from tests.contracts.tasks import EVERY_ACT, a_task, act
from tests.executor.runtime.fake_device import CountedTime, DeviceError, FakeDevice
from tests.executor.runtime.test_engine import CPU_DECODE, GPU_DECODE, PREFILL, no_setup

DEVICE_LANES = (Lane.GPU, Lane.H2D, Lane.D2H)
PIPELINES = {"cpu": CPU_DECODE, "gpu": GPU_DECODE, "prefill": PREFILL}


def is_of_device(error: BaseException) -> bool:
    return isinstance(error, DeviceError)


@pytest.fixture
def clock(monkeypatch) -> CountedTime:
    """What the engine, its lanes and the device all read the time from."""
    made = CountedTime()
    for module in ("engine", "lanes"):
        monkeypatch.setattr(f"executor.{module}.perf_counter", made)
    return made


@pytest.fixture
def device(clock):
    made = FakeDevice(late_s=2e-4, clock=clock)
    yield made
    made.close()


@pytest.fixture
def engine(device):
    streams = {lane: device.stream() for lane in DEVICE_LANES}
    with Engine(no_setup, streams, is_of_device) as started:
        yield started


def queueing(device, work):
    """Handlers whose work a device's stream does later, and a host's lane at once."""

    def handle(task: Task) -> int:
        device.queue(lambda: work(task.id))
        return 1

    return dict.fromkeys((*EVERY_ACT, act("SAMPLE", Lane.CPU)), handle)


@pytest.mark.parametrize("schedule", ScheduleName)
@pytest.mark.parametrize("pipeline", PIPELINES.values(), ids=PIPELINES)
def test_every_edge_is_kept_on_the_device(engine, device, clock, pipeline, schedule):
    tasks = list(iter_tasks(pipeline, schedule))
    after = {task.id: task.after for task in tasks}
    done: set[TaskId] = set()
    done_s: dict[TaskId, float] = {}
    early: list[tuple[TaskId, TaskId]] = []

    def work(task: TaskId) -> None:
        early.extend((task, other) for other in after[task] if other not in done)
        time.sleep(1e-4)
        done.add(task)
        done_s[task] = clock() - engine.origin_s

    result = engine.run(tasks, queueing(device, work))
    assert early == []
    assert done == after.keys(), "nothing is at work any more when a run returns"
    spans = {span.id: span for span in result.spans}
    assert spans.keys() == after.keys()
    for task in tasks:
        assert spans[task.id].start_s < done_s[task.id] < spans[task.id].end_s
        assert all(spans[other].end_s <= spans[task.id].start_s for other in task.after)
    assert sum(total.num_bytes for total in result.by_kind.values()) == len(tasks)
    assert max(span.end_s for span in result.spans) <= result.end_s


def test_waits_are_those_of_the_edges_between_streams(engine, device):
    names = ("LOAD_PAGE", "LOAD_PAGE", "PRE_ATTENTION", "OFFLOAD_QKV")
    a, b, c, d = (TaskId(act(name), i, 0) for i, name in enumerate(names))
    tasks = [Task(a), Task(b, (a,)), Task(c, (a, b)), Task(d)]
    engine.run(tasks, queueing(device, lambda _: None))
    gpu, h2d, d2h = device.streams
    assert len(gpu.waited) == 2
    assert not h2d.waited, "a stream keeps its own order"
    assert not d2h.waited


@pytest.mark.parametrize(("name", "most"), [("SAMPLE", QUEUED_TASKS), ("PREFILL_LAYER", QUEUED_LAYERS)])
def test_a_lane_runs_ahead_of_its_stream_only_so_far(engine, device, name, most):
    """Of layers of prefill, which are hundreds of kernels each, not as far."""
    full, beyond = threading.Event(), threading.Event()
    queued = 0

    def handle(_: Task) -> int:
        nonlocal queued
        queued += 1
        if queued == 1:
            device.queue(hold)
        if queued == most + 1:
            full.set()
        elif queued > most + 1:
            beyond.set()
        return 0

    def hold() -> None:
        """Keep the stream at its first task until the lane is as far ahead as it may be, and a little longer."""
        found.append((full.wait(30), beyond.wait(0.2)))

    found: list[tuple[bool, bool]] = []
    of_lane = act(name, Lane.GPU)
    engine.run([Task(TaskId(of_lane, 0, 0, step)) for step in range(100)], {of_lane: handle})
    assert found == [(True, False)]
    assert queued == 100


def test_an_edge_to_a_task_long_past_is_kept(engine, device):
    """The engine forgets what is done: on a device that is not what was queued."""
    gate, order = threading.Event(), []
    first, last = TaskId(act("LOAD_PAGE"), 0, 0), TaskId(act("PRE_ATTENTION"), 0, 0)

    def work(task: TaskId) -> None:
        if task == first:
            assert gate.wait(30)
        order.append(task)

    def tasks():
        yield Task(first)
        for step in range(MOST_PENDING + 50):
            yield a_task("SAMPLE", 0, 0, step, lane=Lane.CPU)
        yield Task(last, (first,))

    timer = threading.Timer(0.3, gate.set)
    timer.start()
    engine.run(tasks(), queueing(device, work))
    timer.join()
    assert order.index(first) < order.index(last)


def failing(task: TaskId, at: TaskId) -> None:
    if task == at:
        raise OSError("an address that is none")


@pytest.mark.parametrize("lane", [Lane.GPU, Lane.CPU])
def test_late_error_names_the_first_task_that_may_have_failed(engine, device, lane):
    bad = TaskId(act("POST_ATTENTION"), 3, 0)
    ids = [TaskId(act("POST_ATTENTION"), layer, 0) for layer in range(40)]
    tasks = [Task(one) for one in ids]
    if lane is Lane.CPU:  # the host is the one to find out
        tasks.insert(4, a_task("ATTENTION", 0, 0, lane=Lane.CPU, after=(bad,)))
    with pytest.raises(TaskFailedError, match="device error") as failed:
        engine.run(tasks, queueing(device, lambda task: failing(task, bad)))
    assert failed.value.task.id.layer <= 3
    assert failed.value.task.lane is Lane.GPU
    assert failed.value.task.id.layer + failed.value.may_be_later >= 3
    assert f"or one of {failed.value.may_be_later} tasks queued after it" in str(failed.value)
    assert SYNCHRONISE in str(failed.value)
    assert "!" in failed.value.chart


def test_synchronising_names_it_exactly(device, monkeypatch):
    monkeypatch.setenv(SYNCHRONISE, "1")
    bad = TaskId(act("POST_ATTENTION"), 3, 0)
    tasks = [a_task("POST_ATTENTION", layer, 0, lane=Lane.GPU) for layer in range(40)]
    streams = {lane: device.stream() for lane in DEVICE_LANES}
    with Engine(no_setup, streams, is_of_device) as engine, pytest.raises(TaskFailedError) as failed:
        engine.run(tasks, queueing(device, lambda task: failing(task, bad)))
    assert failed.value.task.id == bad
    assert failed.value.may_be_later == 0


def test_an_error_of_the_host_is_of_its_own_task(engine, device):
    def fail(task: Task) -> int:
        if task.id.layer == 5:
            raise ValueError("a shape")
        device.queue(lambda: time.sleep(1e-3))
        return 0

    tasks = [a_task("PRE_ATTENTION", layer, 0, lane=Lane.GPU) for layer in range(9)]
    with pytest.raises(TaskFailedError, match="a shape") as failed:
        engine.run(tasks, {act("PRE_ATTENTION"): fail})
    assert failed.value.task.id.layer == 5
    again = engine.run(tasks, queueing(device, lambda _: None))
    assert again.by_kind["PRE_ATTENTION"].count == 9


def test_times_are_the_devices(engine, device, clock):
    tasks = [a_task("PRE_ATTENTION", layer, 0, lane=Lane.GPU) for layer in range(20)]
    result = engine.run(tasks, queueing(device, lambda _: clock.pass_(1000)))
    assert 20 * 1000 <= result.busy_s[Lane.GPU] <= result.seconds
