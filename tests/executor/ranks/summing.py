"""Ranks that only sum up with one another, as the graph of a tiny model on two GPUs says, and where one goes wrong.

As a module it is a rank other than 0.
"""

import json
import os
import signal
import time

import torch

from executor.backends import make_backend
from executor.batching import Completion
from executor.errors import RunError
from executor.generate import AbstractGenerator, BatchResult, Planned
from executor.handlers import LENGTH
from executor.ranks.worker import end_with_parent, serve
from hrm.acts import ACTS
from hrm.memory import plan_memory
from hrm.schedules import decode_pipeline, iter_tasks, prefill_pipeline
from tests.executor.runtime.support import machine, make_policy
from tests.executor.tiny_models import tiny_arch

LAYERS = 3
WRONG = RunError("its numbers", "<wrong>", "must be right", "correct them")


class Summing(AbstractGenerator):
    """Answers each request with the sums of the ranks' numbers; at the `fault`'s task something happens."""

    def __init__(self, group, fault=None):
        arch = tiny_arch(num_layers=LAYERS)
        narrow = arch.of_rank(group.rank, arch.spec.of_rank(group.size))
        policy = make_policy(LAYERS, batch_size=4, micro_batch_size=2)
        planned = Planned(policy, plan_memory(narrow.spec, policy, machine()))
        super().__init__(make_backend("cpu", None), narrow, planned, 1000)
        self.load_s, self._group, self._fault, self._sums = 0.0, group, fault, []
        if fault == "refuses":
            raise WRONG

    def generate(self, batch, *, index=0, sink=None, schedule=None):
        self._sums.clear()
        spec, policy = self.arch.spec, self._policy_of(batch, schedule)
        prefill = prefill_pipeline(spec, policy, num_chunks=1)
        decode = decode_pipeline(spec, policy, num_steps=max(batch.num_steps, 1))
        handlers = {act: self._do for acts in ACTS.values() for act in acts}
        prefilled, decoded = (
            self.engine.run(iter_tasks(one, self.policy.schedule), handlers) for one in (prefill, decode)
        )
        tokens = tuple(self._sums)
        completions = tuple(Completion(request, tokens, LENGTH) for request in batch.requests)
        return BatchResult(completions, prefilled, decoded, (batch.micro_batch_sizes,), 1)

    def rescue(self):
        return None

    @property
    def peak_bytes(self):
        return {}

    def _do(self, task):
        if self._fault and str(task.id) == "A1.0" and not task.id.step and task.id.phase.value == "decode":
            happen(self._fault)
        if task.id.act.reduces:
            number = torch.tensor([self._group.rank + len(self._sums)])
            self._group.all_reduce(number)
            self._sums.append(int(number))
        return 0


def happen(fault):
    match fault:
        case "raises":
            raise WRONG
        case "breaks":
            raise ZeroDivisionError("oh\nno")
        case "interrupts":
            os.kill(os.getpid(), signal.SIGINT)
        case "sleeps":
            time.sleep(600)
        case _:
            os.kill(os.getpid(), signal.Signals[fault])


def of_rank(message, group):
    """What rank 0 tells is where what goes wrong."""
    fault = json.loads(message)
    return Summing(group, fault["fault"] if fault.get("rank") == group.rank else None)


class Served:
    """A rank other than 0, which reports how many batches it has run since it last did."""

    def __init__(self, message, group):
        self.generator: AbstractGenerator = of_rank(message, group)
        self._batches = 0

    def add(self, result):
        self._batches += 1

    def report(self):
        batches, self._batches = self._batches, 0
        return str(batches).encode()


if __name__ == "__main__":
    end_with_parent()
    serve(Served)
