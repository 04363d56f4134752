"""Up to which size the native kernels do a kind of work, and torch what is larger: as measured on this machine.

Which of both is faster depends on the processor, on what torch finds there, and on how many threads there are.
So both are tried the first time that it matters, for a fraction of a second. What came out is kept for later
runs in `native.json` of the user's cache folder, unless others kept the machine busy meanwhile, and in profiles.
EXECUTOR_NATIVE_UP_TO=N in the environment stands for all of it: then nothing is measured.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from io import FileIO
from math import inf, log
from pathlib import Path
from typing import Any, Final, cast

import torch

from executor import native
from executor.errors import RunError
from executor.random_weights import RandomWeights
from hrm.decoding import Malformed, decode_json
from hrm.hardware import HardwareProfile
from hrm.locks import open_locked
from hrm.profiling.environment import BUSY, Others, host_facts
from hrm.units import MIB, counted, is_whole_number

VARIABLE: Final = "EXECUTOR_NATIVE_UP_TO"
ALWAYS: Final = 1 << 30
BUDGET_S: Final = 0.3  # if nobody disturbs; after it no larger size is tried

_TURNS: Final = 3
_PAST_CACHES_BYTES: Final = 64 * MIB
_PATIENCE_S: Final = 10.0  # with another process that measures
_MAX_BYTES: Final = 1 << 20

TOKENS_TRIED: Final = tuple(1 << i for i in range(9))

Trial = Callable[[int], Callable[[], object]]  # what is done at a size


@dataclass(frozen=True, slots=True)
class Work:
    """A kind of work that both can do: its name, growing sizes to try, and what is tried of a dtype."""

    name: str
    sizes: tuple[int, ...]
    trial_of: Callable[[torch.dtype], Trial]


Key = tuple[Work, torch.dtype, str, int]

_lock = threading.RLock()
_known: dict[Key, int] = {}
_adopted: dict[str, int] = {}


class _Assumed(threading.local):
    """What a thread takes for measured while it measures."""

    up_to: int | None = None


_assumed = _Assumed()


def native_up_to(work: Work, dtype: torch.dtype) -> int:
    """The greatest size of that work for which the calling thread uses the native kernels.

    It is measured if nobody did. Raises RunError if EXECUTOR_NATIVE_UP_TO is no number.
    """
    if _assumed.up_to is not None:
        return _assumed.up_to
    given = _given()
    if given is not None:
        return given
    kernels = native.kernels()
    if kernels is None:
        return 0
    key = (work, dtype, kernels.path, torch.get_num_threads())
    found = _known.get(key)
    return _settled(key) if found is None else found


def settle(works: Iterable[Work], dtype: torch.dtype, threads: int) -> dict[str, int]:
    """Find out now what so many threads would have to in the midst of work; returns it as a profile keeps it.

    That is nothing where nothing is to be measured.
    """
    kernels, before = native.kernels(), torch.get_num_threads()
    if kernels is None or _given() is not None:
        return {}
    torch.set_num_threads(threads)
    try:
        return {_text((work, dtype, kernels.path, threads)): native_up_to(work, dtype) for work in works}
    finally:
        torch.set_num_threads(before)


def adopt(profile: HardwareProfile) -> None:
    """From here on take for measured what a profile keeps, if it is of this machine and these kernels."""
    measured_with = _measured_with()
    with _lock:
        _known.clear()
        _adopted.clear()
        if all(profile.environment.get(name) == value for name, value in measured_with.items()):
            for level in profile.levels:
                _adopted.update(level.processor.native_up_to)


@contextmanager
def assumed(up_to: int) -> Generator[None]:
    """Within it that is the greatest size of all work of the calling thread."""
    before, _assumed.up_to = _assumed.up_to, up_to
    try:
        yield
    finally:
        _assumed.up_to = before


def measured(trial: Trial, sizes: tuple[int, ...]) -> int:
    """Up to which of growing sizes the native kernels gain the most time on torch, as a ratio, all taken together.

    None counts for more than a factor of two, so that one disturbed size decides little. If the last
    that was tried is one of them, all greater are.
    """
    lost = least = taken_s = 0.0
    up_to = size = 0
    for size in sizes:
        native_s, torch_s = _seconds(trial(size))
        lost += log(min(2.0, max(0.5, native_s / torch_s)))
        if lost < least:
            least, up_to = lost, size
        # The least that each turn takes, not what it took: of waiting for others a few sizes would use up all.
        taken_s += (1 + _TURNS) * (native_s + torch_s)
        if taken_s > BUDGET_S:
            break
    return ALWAYS if up_to == size else up_to


def _seconds(work: Callable[[], object]) -> tuple[float, float]:
    """The least time that the native kernels take and that torch takes, in turns after one to warm up."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best_s = [inf, inf]
    for turn in range(1 + _TURNS):
        for side, up_to in enumerate((ALWAYS, 0)):
            with assumed(up_to):
                start_s = clock()
                work()
                seconds = clock() - start_s
            if turn > 0:
                best_s[side] = min(best_s[side], max(seconds, 1e-9))
    return best_s[0], best_s[1]


def random_numbers(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What to try with: numbers of usual sizes, soon made."""
    numbers = torch.empty(shape, dtype=dtype)
    RandomWeights().read_into("tried", numbers)
    return numbers


def past_caches(elements: int, dtype: torch.dtype) -> int:
    """How many weights of so many elements are read from memory if one is taken after the other."""
    return max(2, _PAST_CACHES_BYTES // (elements * dtype.itemsize))


@cache
def _given() -> int | None:
    text = os.environ.get(VARIABLE)
    if text is None:
        return None
    if not is_whole_number(text):
        raise RunError(VARIABLE, text, "must be a whole number, the greatest size for native kernels", "correct it")
    return min(int(text), ALWAYS)


def _settled(key: Key) -> int:
    """As adopted, as kept by an earlier run, or measured now, by one thread and one process at a time."""
    text = _text(key)
    with _lock:
        if key not in _known and text in _adopted:
            _known[key] = _adopted[text]
        if key not in _known:
            with _opened() as file, torch.inference_mode():
                machines = _read(file)
                kept = machines.setdefault(_machine(), {})
                if text not in kept:
                    others = Others()
                    kept[text] = measured(key[0].trial_of(key[1]), key[0].sizes)
                    if others.share() <= BUSY:
                        _write(file, machines)
                _known[key] = kept[text]
        return _known[key]


def _text(key: Key) -> str:
    work, dtype, path, threads = key
    return f"{work.name}, {str(dtype).removeprefix('torch.')}, {path}, {counted(threads, 'thread')}"


@cache
def _measured_with() -> Mapping[str, str]:
    """Lines of a profile's environment that decide whether its figures hold here."""
    return {"cpu": host_facts().cpu_name, "kernels": native.description(), "torch": str(torch.__version__)}


def _machine() -> str:
    return f"{_measured_with()['cpu']}, torch {torch.__version__}, executor {version('moe-hrm')}"


# ------------------------------------------------------------------------------- the kept figures


@contextmanager
def _opened() -> Generator[FileIO | None]:
    """The file of what was measured, for this process alone; None where there can be none."""
    file = None
    try:
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe-hrm" / "native.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _locked(path)
    except (OSError, RuntimeError):  # a folder that cannot be written to, or no home
        pass
    try:
        yield file
    finally:
        if file is not None:
            file.close()


def _locked(path: Path) -> FileIO:
    until_s = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return open_locked(path)
        except BlockingIOError:
            if time.monotonic() > until_s:
                raise
            time.sleep(0.02)


def _read(file: FileIO | None) -> dict[str, dict[str, int]]:
    """Sizes by machine and key; what is no such thing is left out."""
    try:
        document = decode_json(file.read(_MAX_BYTES) or b"{}") if file else {}
    except (OSError, Malformed):
        return {}
    machines = cast("dict[str, Any]", document) if isinstance(document, dict) else {}
    return {
        machine: {key: size for key, size in cast("dict[str, Any]", sizes).items() if type(size) is int and size >= 0}
        for machine, sizes in machines.items()
        if isinstance(sizes, dict)
    }


def _write(file: FileIO | None, machines: dict[str, dict[str, int]]) -> None:
    if file is not None:
        with suppress(OSError):  # say, a full disk: the next run measures again
            file.seek(0)
            file.truncate()
            file.write(json.dumps(machines, indent=1).encode())
