"""Live progress of a job on stderr: a bar in a terminal, a plain line now and then elsewhere."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import click

from hrm.units import format_seconds

if TYPE_CHECKING:
    from executor.job import JobProgress
    from hrm.tasks import Lane

_PLAIN_INTERVAL_S: Final = 10.0


class Meter:
    """Rates between two looks at a job."""

    def __init__(self, progress: "JobProgress") -> None:
        self._progress = progress
        self._started_s = self._looked_s = time.monotonic()
        self._busy_s: dict[Lane, float] = {}
        self._shares: dict[Lane, float] = {}

    def text(self) -> str:
        """Requests done, tokens a second, time left and busy share per lane, in one line."""
        progress, now_s = self._progress, time.monotonic()
        elapsed_s = now_s - self._started_s
        done, total, tokens = (
            progress.done_requests, progress.total_requests, progress.generated_now,
        )  # fmt: skip
        parts = [progress.stage, f"{done}/{total} requests"]
        if tokens:
            parts.append(f"{tokens / elapsed_s:.0f} tokens/s")
        if 0 < done < total:
            parts.append(f"{format_seconds(elapsed_s * (total - done) / done)} left")
        self._look(now_s)
        busy = [f"{lane} {share:.0%}" for lane, share in self._shares.items() if share >= 0.005]
        return " · ".join([*parts, " ".join(busy)] if busy else parts)

    def _look(self, now_s: float) -> None:
        if now_s - self._looked_s < 0.5:
            return
        busy_s = self._progress.busy_s
        self._shares = {
            lane: min(max(busy - self._busy_s.get(lane, 0.0), 0.0) / (now_s - self._looked_s), 1.0)
            for lane, busy in busy_s.items()
        }
        self._busy_s, self._looked_s = busy_s, now_s


@contextmanager
def live_progress(progress: "JobProgress", *, quiet: bool) -> Iterator[None]:
    """Show the job's progress while the body runs."""
    if quiet:
        yield
    elif sys.stderr.isatty():
        with _bar(progress):
            yield
    else:
        with _plain_lines(progress):
            yield


@contextmanager
def _bar(progress: "JobProgress") -> Iterator[None]:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    meter = Meter(progress)

    def render() -> Group:
        total = max(progress.total_requests, 1)
        return Group(ProgressBar(total=total, completed=progress.done_requests), Text(meter.text()))

    with Live(console=Console(stderr=True), get_renderable=render, refresh_per_second=4):
        yield


@contextmanager
def _plain_lines(progress: "JobProgress") -> Iterator[None]:
    meter, ended = Meter(progress), threading.Event()

    def report() -> None:
        while not ended.wait(_PLAIN_INTERVAL_S):
            click.echo(meter.text(), err=True)

    thread = threading.Thread(target=report, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
