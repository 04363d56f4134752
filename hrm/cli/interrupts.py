"""SIGINT, SIGTERM and SIGHUP as KeyboardInterrupt, raised only where it is not lost."""

import os
import signal
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, NoReturn

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

_AGAIN_S: Final = 0.01
_PATIENCE_S: Final = 0.3
_IMPORTS: Final = "<frozen importlib._bootstrap>"  # the file of the frames that import a module
_SHOW_CURSOR: Final = "\x1b[?25h"  # a bar may have hidden it


class Interrupts:
    """The signals that end a command: which one came, and since when it is to be raised.

    While modules are imported it waits: numpy and typing catch whatever is raised then, and C++ of torch ends the
    process by `abort`. After 0.3 s, as torch takes, or at another signal the process ends at once: what commands keep
    they begin after such imports. What is raised in a `__del__` or in a callback of the garbage collector is lost, too;
    Python hands it to `sys.unraisablehook`, and it is raised once more.
    """

    def __init__(self, text: str) -> None:
        """Before anything was received; `text` is said where the process ends at once."""
        self.received = signal.SIGINT
        self._text = text
        self._waits_since_s: float | None = None
        self._unraisable = sys.unraisablehook

    @contextmanager
    def raised(self) -> Generator[None]:
        """Within it signals raise KeyboardInterrupt; those that are ignored, as under nohup, stay so."""
        before: dict[signal.Signals, Any] = {}
        self._unraisable = sys.unraisablehook
        try:
            with suppress(ValueError):  # only the main thread can handle signals
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    if signal.getsignal(number) is not signal.SIG_IGN:
                        before[number] = signal.signal(number, self._receive)
                before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._raise)
                sys.unraisablehook = self._raise_once_more
            yield
        finally:
            sys.unraisablehook = self._unraisable
            if signal.SIGALRM in before:
                signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._waits_since_s is not None:
            self._leave()
        self.received = signal.Signals(number)
        self._raise(number, frame)

    def _raise(self, _: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if not _is_importing(frame):
            self._waits_since_s = None
            raise KeyboardInterrupt
        if self._waits_since_s is None:
            self._waits_since_s = now_s
        if now_s - self._waits_since_s > _PATIENCE_S:
            self._leave()
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)

    def _leave(self) -> NoReturn:
        with suppress(OSError):
            os.write(2, f"{_SHOW_CURSOR if os.isatty(2) else ''}\n{self._text}\n".encode())
        os._exit(128 + self.received)

    def _raise_once_more(self, lost: "UnraisableHookArgs") -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
        else:
            self._unraisable(lost)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTS:
            return True
        frame = frame.f_back
    return False
