"""Live progress of a job on stderr: a bar in a terminal, a plain line now and then elsewhere."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

import click

from hrm.units import format_bytes

if TYPE_CHECKING:
    from executor.job import JobProgress
    from hrm.tasks import Lane

_PLAIN_INTERVAL_S: Final = 10.0
_LOOK_INTERVAL_S: Final = 1.0
BAR_WIDTH: Final = 60


class Meter:
    """Rates of a job; the shares are of the time between two looks at it."""

    def __init__(self, progress: "JobProgress") -> None:
        self._progress = progress
        self._started_s: float | None = None  # once the weights were loaded
        self._loading = ""  # the stage in which bytes are fetched or loaded, since when, and how many were there
        self._loading_s, self._loaded_bytes = 0.0, 0
        self._looked_s = 0.0
        self._busy_s: dict[Lane, float] = {}
        self._shares: dict[Lane, float] = {}

    def text(self) -> str:
        """Phase, requests done, tokens a second, time left and busy lanes, in one line."""
        progress, now_s = self._progress, time.monotonic()
        phase = progress.phase
        stage = self._stage
        if phase is not None:
            stage += f", {phase.value} {progress.share_of_batch:.0%}"
        parts = [stage]
        if progress.total_requests:
            parts.append(f"{progress.done_requests}/{progress.total_requests} requests")
        if progress.generator is None and not progress.elsewhere:
            return " · ".join([*parts, *self._loaded(now_s)])
        if self._started_s is None:
            self._started_s = self._looked_s = now_s
        elapsed_s = max(now_s - self._started_s, 1e-9)
        if progress.generated_tokens:
            parts.append(f"{progress.generated_tokens / max(elapsed_s, 1.0):.0f} tokens/s")
        left_s = progress.left_s_elsewhere(elapsed_s) if progress.elsewhere else progress.left_s
        if left_s is not None:
            parts.append(f"{format_countdown(left_s)} left")
        self._look(now_s)
        busy = " ".join(f"{lane} {share:.0%}" for lane, share in self._shares.items())
        return " · ".join([*parts, f"busy: {busy}"] if busy else parts)

    @property
    def _stage(self) -> str:
        """What is being done: what loading says, until there is a generator."""
        of_loading = self._progress.loading.stage if self._progress.generator is None else ""
        return of_loading or self._progress.stage

    @property
    def share(self) -> float:
        """From 0 to 1: how much of the weights is loaded, and then how much of the job is done."""
        loading = self._progress.loading
        if self._progress.generator is None and loading.total_bytes:
            return loading.done_bytes / loading.total_bytes
        return self._progress.share_done

    def _loaded(self, now_s: float) -> list[str]:
        """Bytes of weights that are fetched or loaded, a second, and the time left."""
        loading = self._progress.loading
        if not loading.total_bytes:
            return []
        if self._loading != self._stage:
            self._loading, self._loading_s, self._loaded_bytes = self._stage, now_s, loading.done_bytes
        rate = (loading.done_bytes - self._loaded_bytes) / max(now_s - self._loading_s, 1.0)
        parts = [f"{format_bytes(loading.done_bytes)} of {format_bytes(loading.total_bytes)}"]
        if rate:
            left_s = (loading.total_bytes - loading.done_bytes) / rate
            parts += [f"{format_bytes(rate)}/s", f"{format_countdown(left_s)} left"]
        return parts

    def _look(self, now_s: float) -> None:
        passed_s = now_s - self._looked_s
        if passed_s < 0.5:
            return
        busy_s = self._progress.busy_s
        for lane, now_busy_s in busy_s.items():
            more_s = now_busy_s - self._busy_s.get(lane, 0.0)
            if now_busy_s > 0 or lane in self._shares:
                self._shares[lane] = min(max(more_s / passed_s, 0.0), 1.0)
        self._busy_s, self._looked_s = busy_s, now_s


def format_countdown(seconds: float) -> str:
    """Hours, minutes and seconds as on a clock: `0:07`, `12:34`, `1:02:03`."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def say(line: str) -> None:
    """Print a line on standard error; a job goes on if nobody can read it any more."""
    with suppress(OSError):
        click.echo(line, err=True)


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
    from rich.padding import Padding
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    meter = Meter(progress)

    def render() -> Group:
        bar = ProgressBar(total=1.0, completed=meter.share, width=BAR_WIDTH)
        return Group(Padding(bar, 0), Text(meter.text(), no_wrap=True, overflow="ellipsis"))

    live = Live(console=Console(stderr=True), get_renderable=render, refresh_per_second=4, transient=True)
    with suppress(OSError):  # a terminal that has gone
        live.start()
    try:
        yield
    finally:
        with suppress(OSError):
            live.stop()


@contextmanager
def _plain_lines(progress: "JobProgress") -> Iterator[None]:
    meter, ended = Meter(progress), threading.Event()

    def report() -> None:
        reported_s = time.monotonic()
        while not ended.wait(_LOOK_INTERVAL_S):  # rates are of the time between looks
            text = meter.text()
            if time.monotonic() - reported_s >= _PLAIN_INTERVAL_S:
                say(text)
                reported_s = time.monotonic()

    thread = threading.Thread(target=report, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
