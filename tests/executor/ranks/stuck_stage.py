"""A rank of a job, as a module: in an early task of decode something happens to it, as the environment says."""

import os
import signal
import time
from typing import Any

from executor.handlers.stages import StageDecode
from executor.job.rank import JobRank
from executor.ranks.worker import end_with_parent, serve
from hrm.acts import decode

FAULT = "TEST_FAULT_OF_STAGE"


def with_fault(by_act: Any) -> Any:
    """The handlers of a stage's decode, one of which never comes to its end."""

    def broken(self: StageDecode) -> Any:
        handlers = by_act(self)
        first, own = True, handlers[decode.PRE_ATTENTION]

        def handler(x: Any) -> int:
            nonlocal first
            if first:
                first = False
                return own(x)
            if os.environ[FAULT] == "SIGSTOP":
                time.sleep(1)  # so that it has told what it is at
                os.kill(os.getpid(), signal.SIGSTOP)
            while True:
                time.sleep(60)

        return {**handlers, decode.PRE_ATTENTION: handler}

    return broken


if __name__ == "__main__":
    StageDecode.by_act = with_fault(StageDecode.by_act)
    end_with_parent()
    serve(JobRank)
