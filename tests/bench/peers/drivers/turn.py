"""A turn of any engine: load it once, then time every row. Nothing but the standard library is imported here."""

import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

Tokens = list[list[int]]


@dataclass(frozen=True)
class Job:
    """What an engine is asked for: its checkpoint, prompts of token ids, and rows of (requests, new tokens).

    `kept` is a folder of the engine's own for what it makes of the checkpoint once, and `profile` the file of our
    profile of the machine. `cpus` may be computed with.
    """

    checkpoint: str
    kept: str
    profile: str
    small: bool
    cpus: list[int]
    prompts: Tokens
    rows: list[list[int]]

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and answer."""
        return max(map(len, self.prompts)) + max(new for _, new in self.rows)

    @property
    def most_requests(self) -> int:
        """Requests of the largest row."""
        return max(requests for requests, _ in self.rows)


class Engine(ABC):
    """An engine that is loaded when it is made."""

    packages: Sequence[str] = ()

    def prepare(self, requests: int, new_tokens: int) -> None:  # noqa: B027 - most have nothing to prepare
        """Get ready for a row, outside the clock."""

    @abstractmethod
    def generate(self, prompts: Tokens, new_tokens: int) -> Tokens:
        """The new tokens of every prompt: greedy, in bfloat16, and as many as asked for whatever they are."""

    def warm_up(self, prompts: Tokens, new_tokens: int) -> dict[str, Any]:
        """Run what is timed next once, or a little of it; what comes back is kept with the row."""
        self.generate(prompts, min(2, new_tokens))
        return {}

    def close(self) -> None:  # noqa: B027 - most end with their process
        """End what was started, outside the clock."""


def take_turn(start: type[Engine]) -> None:
    """Do the job of the file named first, and write what was found to the one named second."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    begun_s = time.perf_counter()
    engine: Any = start(job)  # pyright: ignore[reportCallIssue] - every engine takes the job
    load_s = time.perf_counter() - begun_s
    rows = {f"{requests}x{new}": timed_row(engine, job.prompts[:requests], new) for requests, new in job.rows}
    engine.close()
    found = {"load_s": load_s, "versions": {name: version(name) for name in engine.packages}, "rows": rows}
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")


def timed_row(engine: Engine, prompts: Tokens, new_tokens: int) -> dict[str, Any]:
    """How long one new token a request takes, which is prefill, and all of them."""
    engine.prepare(len(prompts), new_tokens)
    facts = engine.warm_up(prompts, new_tokens)
    prefill = timed(engine, prompts, 1)
    whole = timed(engine, prompts, new_tokens)
    wrong = [len(answer) for answer in whole.tokens if len(answer) != new_tokens]
    if wrong or len(whole.tokens) != len(prompts):
        got = wrong[:3] or len(whole.tokens)
        raise SystemExit(f"answers of {got} where {len(prompts)} of {new_tokens} were asked for")
    return {
        "prefill_s": prefill.seconds,
        "seconds": whole.seconds,
        "processor_s": whole.processor_s,
        "others": whole.others,
        "tokens": whole.tokens,
        "facts": facts,
    }


@dataclass(frozen=True)
class Timed:
    """Answers, the seconds they took on the wall, those of all cores together, and the share of cores others had."""

    tokens: Tokens
    seconds: float
    processor_s: float
    others: float


def timed(engine: Engine, prompts: Tokens, new_tokens: int) -> Timed:
    """Have the engine answer the prompts."""
    own_s, busy_s, start_s = processor_s(), machine_s(), time.perf_counter()
    tokens = engine.generate(prompts, new_tokens)
    seconds, own_s, busy_s = time.perf_counter() - start_s, processor_s() - own_s, machine_s() - busy_s
    others = max(0.0, busy_s - own_s) / (seconds * (os.cpu_count() or 1))
    return Timed(tokens, seconds, own_s, min(others, 1.0))  # the system counts in ticks, which are coarse


def machine_s() -> float:
    """Seconds that all cores have been busy until now, or were taken by the hypervisor."""
    user, nice, system, _idle, _waiting, *rest = Path("/proc/stat").read_text(encoding="utf-8").split()[1:9]
    return sum(map(int, (user, nice, system, *rest))) / os.sysconf("SC_CLK_TCK")


def processor_s() -> float:
    """Seconds that the processes of this session, which a turn has for itself, have computed until now."""
    ticks, session = 0, str(os.getsid(0))
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it may have ended since
            words = file.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if words[3] == session:
                ticks += int(words[11]) + int(words[12])
    return ticks / os.sysconf("SC_CLK_TCK")
