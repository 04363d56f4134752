"""Where both commands begin and end: from here on Ctrl-C ends them in one line.

`import hrm` and `import executor` are the libraries. This package imports them only when a command is called, so that
no signal finds a module half imported: its traceback would tell nobody anything.
"""

import atexit
import os
import signal
import sys

TYPE_CHECKING = False  # without `typing`, which takes longer to import than all else here
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

_SIGNALLED = 128  # a shell's code of what a signal ended is this and the signal's number


def hrm() -> None:
    """The command `hrm`."""
    end = _begin()
    from hrm.cli import main

    end.call(main)


def executor() -> None:
    """The command `executor`."""
    end = _begin()
    from executor.cli import main

    end.call(main)


def _begin() -> "_End":
    """End the process on SIGINT, unless that is ignored: before a command does anything, and once all is done.

    In between `hrm.cli.interrupts` has a command end in good order.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _at_once)
    end = _End()
    atexit.register(end.leave)  # before all others, so it is called last
    return end


def _at_once(number: int, _: "FrameType | None") -> None:
    try:
        os.write(2, b"\ninterrupted\n")
    finally:
        os._exit(_SIGNALLED + number)


class _End:
    """How a command ends that a signal has ended: there and then.

    Threads that read weights or compute are not waited for. If Python itself ended, it would unwind them, to which C++
    says `abort`.
    """

    _code: int | None = None

    def call(self, main: "Callable[[], None]") -> None:
        """Call a command line, which tells by its exit code whether a signal has ended it."""
        try:
            main()
        except SystemExit as stop:
            if isinstance(stop.code, int) and stop.code > _SIGNALLED:
                self._code = stop.code
            raise

    def leave(self) -> None:
        """End the process if a signal has ended its command."""
        if self._code is None:
            return
        try:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        finally:
            os._exit(self._code)
