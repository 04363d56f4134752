"""What the live display says, and what it says of a job that is under way."""

import threading
import time
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.batching import Completion, Request, pack
from executor.cli import progress as progress_module
from executor.cli.progress import Meter, format_countdown
from executor.engine import Engine
from executor.handlers import BatchState, never_stops
from executor.job import JobOptions, JobProgress, run_job
from executor.job.machine import AcceleratorOptions
from executor.job.progress import Forecast, PhaseProgress
from executor.job.survey import RequestLengths
from executor.loading import Loading
from executor.sampling import SamplingParams
from hrm.tasks import Lane, Phase, Task, TaskId
from tests.contracts.tasks import a_task, act
from tests.executor.runtime.fake_device import FakeDevice
from tests.executor.runtime.jobs import PROMPTS, line, write_lines
from tests.executor.runtime.support import architecture, make_policy


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: now.s))
    return now


def test_text_says_phase_rate_time_left_and_busy_share_per_lane(clock):
    job: Any = SimpleNamespace(
        stage="loading weights",
        generator=None,
        elsewhere=False,
        phase=None,
        total_requests=20,
        done_requests=4,
        generated_tokens=0,
        left_s=None,
        share_of_batch=0.0,
        busy_s={},
        loading=Loading(),
        share_done=0.5,
    )
    meter = Meter(job)
    assert meter.text() == "loading weights · 4/20 requests"
    job.loading.total_bytes = 100 * 10**9
    assert meter.text() == "loading weights · 4/20 requests · 0 B of 100 GB"
    clock.s, job.loading.done_bytes = 50.0, 25 * 10**9
    assert meter.text() == "loading weights · 4/20 requests · 25.0 GB of 100 GB · 500 MB/s · 2:30 left"
    assert meter.share == 0.25
    job.loading.begin("pinning memory", 8 * 10**9)
    assert meter.text() == "pinning memory · 4/20 requests · 0 B of 8.00 GB"
    clock.s = 60.0
    job.loading.add(2 * 10**9)
    assert meter.text() == "pinning memory · 4/20 requests · 2.00 GB of 8.00 GB · 200 MB/s · 0:30 left"
    clock.s = 100.0  # loading does not count
    job.stage, job.generator, job.phase = "batch 1", object(), Phase.PREFILL
    job.left_s, job.share_of_batch = 52.0, 0.25
    assert meter.text() == "batch 1, prefill 25% · 4/20 requests · 0:52 left"
    assert meter.share == 0.5
    clock.s, job.done_requests, job.generated_tokens = 110.0, 8, 50
    job.phase, job.left_s, job.busy_s = Phase.DECODE, 30.0, {Lane.GPU: 5.0, Lane.H2D: 9.0}
    assert meter.text() == "batch 1, decode 25% · 8/20 requests · 5 tokens/s · 0:30 left · busy: GPU 50% H2D 90%"
    clock.s, job.busy_s = 112.0, {Lane.GPU: 6.0, Lane.H2D: 8.9}  # an estimate came down a little
    assert meter.text().endswith("busy: GPU 50% H2D 0%")


@pytest.mark.parametrize(("seconds", "text"), [(7, "0:07"), (754.4, "12:34"), (3723, "1:02:03"), (-1, "0:00")])
def test_countdown(seconds, text):
    assert format_countdown(seconds) == text


def test_text_of_a_model_that_is_fetched_and_then_read(clock):
    progress = JobProgress()
    meter = Meter(progress)
    for clock.s, done, said in (
        (0.0, 10**9, "fetching · 1.00 GB of 4.00 GB"),
        (10.0, 2 * 10**9, "fetching · 2.00 GB of 4.00 GB · 100 MB/s · 0:20 left"),
        (30.0, 4 * 10**9, "reading"),
    ):
        progress.fetched(done, 4 * 10**9)
        assert meter.text() == said


def test_text_of_a_job_that_is_run_elsewhere(clock):
    requests = [Request(f"r{index}", (1, 2), SamplingParams(max_tokens=8)) for index in range(4)]
    progress = JobProgress(stage="running on 2 workers", total_requests=4)
    for request in requests:
        progress.wanted.add(request)
    meter = Meter(progress)
    assert meter.text() == "running on 2 workers · 0/4 requests"
    clock.s, progress.elsewhere = 60.0, True  # loading does not count
    assert meter.text() == "running on 2 workers · 0/4 requests"
    clock.s = 70.0
    progress.end_elsewhere(Completion(requests[0], (1,) * 8, "length"))
    assert meter.text() == "running on 2 workers · 1/4 requests · 1 tokens/s · 0:30 left"


@given(predicted_s=st.floats(1, 1e6), slower=st.floats(0.05, 20), shares=st.tuples(*[st.floats(0, 1)] * 2))
def test_time_left_goes_from_the_prediction_to_what_is_measured(predicted_s, slower, shares):
    """A phase that really takes `slower` times as long as predicted."""
    really_s = predicted_s * slower
    errors = [
        abs(PhaseProgress(predicted_s, share, really_s * share).left_s / (really_s * (1 - share)) - 1)
        for share in sorted(shares)
        if share < 0.999
    ]
    assert PhaseProgress(predicted_s, 0.0, 0.0).left_s == pytest.approx(predicted_s)
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(errors))
    assert PhaseProgress(predicted_s, 0.5, really_s / 2).left_s == pytest.approx(
        really_s / 2, rel=0.1 * abs(slower - 1) / slower + 1e-9
    )
    assert PhaseProgress(predicted_s, 1.0, really_s).left_s == 0


def test_decode_is_expected_to_be_as_much_slower_as_prefill():
    """Prefill took three times as long as predicted; then decode is as fast as predicted."""
    lengths = RequestLengths(requests=2, prompt_tokens=100, new_tokens=50)
    forecast = Forecast({Phase.PREFILL: 10.0, Phase.DECODE: 100.0}, 1.0)
    progress = JobProgress(wanted=lengths, forecast=forecast)
    live: Any = SimpleNamespace(
        share_done=lambda phase, _: float(phase is Phase.PREFILL),
        seconds_in=lambda phase: 30.0 if phase is Phase.PREFILL else 0.0,
    )
    progress.generator = SimpleNamespace(live=live)  # pyright: ignore[reportAttributeAccessIssue]
    progress._batch = lengths
    assert progress.left_s == pytest.approx(300, rel=0.05)
    live.share_done = lambda phase, _: 1.0 if phase is Phase.PREFILL else 0.8
    live.seconds_in = lambda phase: 30.0 if phase is Phase.PREFILL else 80.0
    assert progress.left_s == pytest.approx(20, rel=0.15)


@pytest.mark.parametrize("fixed_share", [0.0, 0.3, 1.0])
def test_decode_moves_by_the_time_of_its_steps(folder, fixed_share):
    """Against the sum of the steps' times, each of those that go on in it."""
    wanted = [
        Request(str(i), (3,), SamplingParams(max_tokens=max_tokens, ignore_eos=True))
        for i, max_tokens in enumerate((1, 9, 4, 4, 6))
    ]
    batch, _ = pack(wanted, make_policy(1))
    state = BatchState(batch, architecture(folder), never_stops)
    sequences = [s for members in state.sequences for s in members]
    going_on = [sum(r.params.max_tokens - 1 > step for r in wanted) for step in range(8)]
    step_s = [fixed_share + (1 - fixed_share) * count / len(wanted) for count in going_on]
    for step in range(9):
        for sequence in sequences:
            if sequence.finish_reason is None:
                state.append(sequence, 5)
        done = sum(step_s[:step]) / sum(step_s)
        assert state.decoded_share(fixed_share) == pytest.approx(done)


@pytest.mark.parametrize("accelerator", ["emulated", "null"])
def test_job_moves_through_both_phases(folder, policy_path, tmp_path, accelerator, monkeypatch):
    """Looked at in the middle of every task that computes: of prefill, and of decode."""
    progress, seen = JobProgress(), []

    def look(task: TaskId) -> None:
        if progress.stage != "warming up":
            seen.append((progress.phase, progress.share_done, progress.left_s, progress.done_requests, task))

    watch(monkeypatch, look)
    lines = [line(f"r{i}", prompt, max_tokens=2 + i % 3, ignore_eos=True) for i, prompt in enumerate(PROMPTS)]
    options = JobOptions(
        model=folder,
        policy=policy_path,
        input=write_lines(tmp_path, lines),
        output_dir=tmp_path / "run",
        accelerator=AcceleratorOptions(name=accelerator),
    )
    run_job(options, progress)
    shares = [share for _, share, *_ in seen]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert (progress.share_done, progress.left_s) == (1, 0)
    assert all(left_s > 0 for _, _, left_s, *_ in seen)
    assert {phase for phase, *_ in seen} == set(Phase)
    first_batch = [share for phase, share, *_ in seen[: seen.index(seen[-1])] if phase is Phase.PREFILL]
    assert len(set(first_batch)) >= 3  # every layer of a batch's prefill moves the bar
    if accelerator == "emulated":
        ended = [done for *_, done, _ in seen]
        assert ended == sorted(ended)
        assert len(set(ended)) > 3  # more often than batches end
    assert progress.done_requests == progress.total_requests == 10


def watch(monkeypatch, look) -> None:
    """Have `look` called in the lane before every layer of prefill and every choice of tokens."""
    run = Engine.run

    def watched(self, tasks, handlers, **options):
        def looking(handler):
            def handle(task: Task) -> int:
                look(task.id)
                return handler(task)

            return handle

        kinds = (act("PREFILL_LAYER"), act("SAMPLE"))
        wrapped = {k: looking(h) if k in kinds else h for k, h in handlers.items()}
        return run(self, tasks, wrapped, **options)

    monkeypatch.setattr(Engine, "run", watched)


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_task_under_way_counts_as_busy(on_device):
    begun, go_on = threading.Event(), threading.Event()
    device = FakeDevice()
    streams = {Lane.H2D: device.stream()} if on_device else {}

    def wait() -> None:
        begun.set()
        assert go_on.wait(30)

    def handle(_: Task) -> int:
        device.queue(wait)
        return 0

    task = a_task("LOAD_PAGE", 0, 0, lane=Lane.H2D)
    with Engine(lambda _: None, streams) as engine:
        runner = threading.Thread(target=lambda: engine.run([task], {act("LOAD_PAGE"): handle}))
        runner.start()
        assert begun.wait(30)
        before_s = engine.busy_now_s[Lane.H2D]
        time.sleep(0.02)
        assert engine.busy_now_s[Lane.H2D] >= before_s + 0.02
        assert engine.busy_now_s[Lane.GPU] == 0
        assert engine.busy_s[Lane.H2D] == 0
        go_on.set()
        runner.join()
        whole_s = engine.busy_now_s[Lane.H2D]
        assert whole_s == pytest.approx(engine.result().busy_s[Lane.H2D])
        assert whole_s > 0.02
        engine.run([task], {act("LOAD_PAGE"): lambda _: 0})
        assert engine.busy_now_s[Lane.H2D] >= whole_s  # another phase counts on
    device.close()
