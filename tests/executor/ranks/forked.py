"""Stands for `subprocess` where ranks are started: a rank is forked off a process that has imported torch already.

It is a process of its own all the same, with its session, environment, cores and pipes, and runs the same module; it
is there at once rather than after two seconds of the processor.
"""

import os
import runpy
import subprocess
import threading
from multiprocessing.connection import Connection
from typing import ClassVar

from tests.executor.group.ranks import CONTEXT

PIPE, STDOUT, TimeoutExpired = subprocess.PIPE, subprocess.STDOUT, subprocess.TimeoutExpired


class Popen:
    """A rank that has been started by the command `python … -m MODULE`."""

    started: ClassVar[list["Popen"]] = []

    def __init__(self, command, *, env, stdin, stdout, stderr, start_new_session):
        assert (command[-2], stdin, stderr, start_new_session) == ("-m", PIPE, STDOUT, True)
        read, self.stdin = CONTEXT.Pipe(duplex=False)
        printed = Connection(os.dup(stdout.fileno()), readable=False)
        arguments = (command[-1], env, os.sched_getaffinity(0), read, printed)
        self._process = CONTEXT.Process(target=_run, args=arguments, daemon=True)
        self._process.start()
        read.close()
        printed.close()
        self._lock = threading.Lock()  # the exit code can be read once
        self.pid, self.returncode = self._process.pid, None
        self.started.append(self)

    def poll(self):
        with self._lock:
            self.returncode = self._process.exitcode
        return self.returncode

    def kill(self):
        self._process.kill()

    def wait(self, timeout=None):
        with self._lock:
            self._process.join(timeout)
        if self.poll() is None:
            raise TimeoutExpired("a rank", timeout or 0.0)
        return self.returncode


def _run(module: str, environment: dict[str, str], cores: set[int], read: Connection, printed: Connection) -> None:
    os.setsid()
    os.sched_setaffinity(0, cores)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, end in enumerate((read, printed, printed)):
        os.dup2(end.fileno(), descriptor)
        os.set_inheritable(descriptor, True)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
