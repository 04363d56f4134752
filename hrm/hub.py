# pyright: basic
"""Models on the Hugging Face Hub: what names one, and its files in the Hub's own cache.

Cache, token, endpoint and offline mode are those of huggingface_hub, by its environment variables.
What was cut short goes on where it ended.
"""

import errno
import re
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from threading import Event, Thread
from typing import Any, Final, Self, TypeVar

from hrm.errors import ModelError

CONFIG_FILE: Final = "config.json"
_NAMED: Final = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")
_NO_NAMES: Final = (".json", ".yaml", ".safetensors", ".gguf")  # files that are not there, rather
_HEARS_S: Final = 0.2  # after which Ctrl-C is heard at the latest
_ANSWERS_S: Final = 6.0  # after which a Hub that has sent no config does not answer; its library asks on for minutes

T = TypeVar("T")
Progress = Callable[[int, int], object]  # of bytes


@dataclass(frozen=True, slots=True)
class HubModel:
    """A repository of the Hub, at a branch, tag or commit: main if `revision` is None."""

    repository: str
    revision: str | None = None

    @classmethod
    def named(cls, text: str) -> Self | None:
        """The model that `org/name` or `org/name@revision` names; None if the text is no such name."""
        found = _NAMED.fullmatch(text)
        if found is None or found["repository"].endswith(_NO_NAMES):
            return None
        return cls(found["repository"], found["revision"])

    def __str__(self) -> str:
        """As users name it."""
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"

    @property
    def config_name(self) -> str:
        """What its config is called in messages; a spec that is read from it is named as the model is."""
        return f"{self.repository}/{CONFIG_FILE}"

    def config(self) -> Path:
        """Its config.json, fetched unless it is in the cache; ModelError if it cannot be had.

        A Hub that does not answer within seconds is not waited for: then the cache counts.
        """
        from huggingface_hub import hf_hub_download

        def work(*, cached: bool = False) -> str:
            return hf_hub_download(self.repository, CONFIG_FILE, revision=self.revision, local_files_only=cached)

        with self._told_in_a_line(), _without_bars():
            try:
                return Path(_interruptible(work, Event(), within_s=_ANSWERS_S))
            except TimeoutError:
                return Path(work(cached=True))

    def fetch(
        self,
        wanted: Sequence[str],
        *,
        ignored: Sequence[str] = (),
        commit: str | None = None,
        progress: Progress | None = None,
    ) -> Path:
        """The folder of its files with names like those wanted, fetched unless they are in the cache.

        In patterns `*` stands for slashes too. The folder is named after the commit, of which more can
        be asked for. `progress` is called with the bytes that are there and those of all that is
        fetched; without it the Hub's library shows them on a terminal. Raises ModelError if they cannot
        be had.
        """
        from huggingface_hub import snapshot_download

        stop = Event()

        def work() -> str:
            return snapshot_download(
                self.repository,
                revision=commit or self.revision,
                allow_patterns=list(wanted),
                ignore_patterns=list(ignored),
                tqdm_class=None if progress is None else _counting(progress, stop),
            )

        with self._told_in_a_line(), _without_notices():
            return Path(_interruptible(work, stop))

    @contextmanager
    def _told_in_a_line(self) -> Generator[None]:
        try:
            yield
        except Exception as error:
            raise ModelError("--model", str(self), *_told(error, self)) from error


@contextmanager
def _without_notices() -> Generator[None]:
    """Have the Hub's library say nothing but errors."""
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def _without_bars() -> Generator[None]:
    """Have the Hub's library show no progress either."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with _without_notices():
            yield
    finally:
        if shown:
            enable_progress_bars()


def _interruptible(work: Callable[[], T], stop: Event, *, within_s: float = inf) -> T:
    """What `work` returns or raises, or TimeoutError after so long; Ctrl-C ends the wait for it, and sets `stop`.

    By itself the Hub's library would end all files under way first.
    """
    from concurrent.futures import Future, wait  # which loads logging, too: most models need no Hub

    ends_s = time.monotonic() + within_s
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
            done.set_exception(error)

    Thread(target=run, name="fetching", daemon=True).start()
    try:
        while not done.done():  # a signal may reach another thread, or this one just before it waits
            wait([done], timeout=_HEARS_S)
            if time.monotonic() > ends_s and not done.done():
                raise TimeoutError
        return done.result()
    except KeyboardInterrupt:
        stop.set()
        raise


def _counting(progress: Progress, stop: Event) -> Any:
    """A kind of progress bar that is not shown but told; of several for one download the furthest counts.

    Once `stop` is set it ends what it counts.
    """
    from huggingface_hub.utils import tqdm

    bars: list[Any] = []

    class Counting(tqdm):
        format_dict: Any = {}  # noqa: RUF012 - a bar that is not shown has no rate

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})
            self.done = options.get("initial") or 0
            if options.get("unit") == "B":
                bars.append(self)

        def update(self, n: float | None = 1) -> None:
            if stop.is_set():
                raise InterruptedError
            self.done += n or 0
            if bars:
                progress(max(bar.done for bar in bars), max(bar.total or 0 for bar in bars))

        def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:  # noqa: FBT001, FBT002
            """Nothing is shown."""

    return Counting


def _told(error: Exception, model: HubModel) -> tuple[str, str]:
    """The rule that was broken when the Hub was asked, and the remedy."""
    from huggingface_hub import constants, errors

    cache = constants.HF_HUB_CACHE
    match error:
        case errors.GatedRepoError():
            return "must be one that you have access to, and it is gated", (
                f"ask for access on {constants.ENDPOINT}/{model.repository}, and log in with hf auth login or HF_TOKEN"
            )
        case errors.RepositoryNotFoundError():
            return "must be a folder here, or a model on the Hub that you may read", (
                "check the name; for a private one log in with hf auth login or HF_TOKEN"
            )
        case errors.RevisionNotFoundError():
            return "must name a branch, tag or commit after the @", "check the revision"
        case errors.LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            return f"must be in {cache}, as HF_HUB_OFFLINE is set", "unset it, or name a folder"
        case errors.LocalEntryNotFoundError():
            return f"must be in {cache}, as the Hub does not answer", "check the network, or name a folder"
        case errors.EntryNotFoundError():
            return f"must have a {CONFIG_FILE} on the Hub", "use the repository that has the model's safetensors files"
        case errors.HFValidationError():
            return "must be a name that the Hub allows", "check the name"
        case OSError(errno=errno.ENOSPC):
            return f"must fit the disk of {cache}", "free some of it or set HF_HOME elsewhere; what is there is kept"
        case _:
            return f"must come whole from the Hub, which failed: {error}", "try again: it goes on where it ended"
