"""What the live display says, on a clock that the test sets."""

from types import SimpleNamespace
from typing import Any

import pytest

from executor.cli import progress as progress_module
from executor.cli.progress import Meter, format_countdown
from hrm.tasks import Lane


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: now.s))
    return now


def test_text_says_rate_time_left_and_busy_share_per_lane(clock):
    job: Any = SimpleNamespace(
        stage="loading weights", generator=None, total_requests=20, done_requests=4,
        earlier_requests=4, done_now=4.0, generated_now=0, busy_s={},
    )  # fmt: skip
    meter = Meter(job)
    assert meter.text() == "loading weights · 4/20 requests"
    clock.s = 100.0  # loading does not count
    job.stage, job.generator = "batch 1", object()
    assert meter.text() == "batch 1 · 4/20 requests"
    clock.s, job.done_now, job.generated_now = 110.0, 8.0, 50
    job.busy_s = {Lane.GPU: 5.0, Lane.CPU: 0.0, Lane.H2D: 9.0}
    assert (
        meter.text() == "batch 1 · 4/20 requests · 5 tokens/s · 0:30 left · busy: GPU 50% H2D 90%"
    )
    clock.s, job.busy_s = 112.0, {Lane.GPU: 1.0, Lane.CPU: 0.0, Lane.H2D: 0.0}  # the next phase
    assert meter.text().endswith("busy: GPU 50% H2D 0%")


@pytest.mark.parametrize(
    ("seconds", "text"), [(7, "0:07"), (754.4, "12:34"), (3723, "1:02:03"), (-1, "0:00")]
)
def test_countdown(seconds, text):
    assert format_countdown(seconds) == text
