"""What to change if no policy fits: which level lacks how much, and what would be enough.

A policy of one request needs least of both memories, so whether anything fits is soon known, and
every change that is named has been tried.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

import numpy as np

from hrm.errors import HrmError
from hrm.estimate import Estimate
from hrm.formats import FORMATS
from hrm.latency import NO_LIMITS
from hrm.machines import compose, with_memory
from hrm.memory import MemoryPlan, plan_memory
from hrm.scaling import Resource, given_resources
from hrm.search.grid import ALL_THAT_FIT, Grid, make_grid
from hrm.search.lattice import chunk_ranges
from hrm.search.space import KvPlace, Space
from hrm.search.way import space_of_part, ways_of
from hrm.units import at_least_bytes, at_least_seconds, format_bytes, format_seconds, parse_bytes, parse_seconds

MOST_BYTES: Final = 2**50  # of a memory, that are tried
COUNTS: Final = (2, 3, 4, 6, 8, 16)  # of GPUs, that are tried
_MUCH_LESS: Final = 0.8
_TRIED: Final = 8  # of policies of one request: how many are simulated


def advice(space: Space) -> tuple[str, str]:
    """What is lacking, and what to change, for a space in which no policy is found."""
    if fits_somehow(space):
        return _advice_on_limits(space)
    remedies = [text for text in _remedies(space) if text]
    remedy = ", or ".join(remedies) or "choose a smaller model or another machine"
    return _shortage(space), f"try {remedy}" if remedies else remedy


def fits_somehow(space: Space) -> bool:
    """Whether the least of all policies fit: those of one request at a time."""
    return any(bool(grid.fits.any()) for _, grid in _least(space))


def _least(space: Space) -> Iterator[tuple[Space, Grid]]:
    """Policies of one request of every kind, for every way of sharing the GPUs."""
    for way in ways_of(space):
        whole = space_of_part(space, *way)
        for part in () if whole is None else [*whole.of_pinning(), *whole.in_parts(None)]:
            yield from ((part, grid) for grid in _least_of_kinds(part))


def _least_of_kinds(space: Space) -> Iterator[Grid]:
    chunks = [chunk for some in chunk_ranges(space) for chunk in (some.least, some.most)]
    for kind in space.kinds():
        number = 1 + (kind.kv is KvPlace.SOME)
        on_gpu = number if kind.kv is KvPlace.ALL else int(kind.kv is KvPlace.SOME)
        places = [(1, number, on_gpu, ALL_THAT_FIT, chunk) for chunk in chunks]
        grid = make_grid(space, kind, np.array(places))
        if not space.profile.has_accelerator:  # all of it lies there, whether or not it fits
            grid = grid.with_residents(space, np.full(len(grid), space.everything))
        yield grid


def _shortage(space: Space) -> str:
    """Which level lacks how much for the policy that lacks least."""
    plans = [
        plan_memory(part.spec, grid.policy(part, index), part.profile)
        for part, grid in _least(space)
        for index in range(len(grid))
    ]
    plan = min(plans, key=_lacking_bytes)
    lacks = [
        f"level {level.name} lacks {format_bytes(level.parts * level.lacking_bytes)}"
        f" ({format_bytes(level.parts * level.planned_bytes)} needed,"
        f" {format_bytes(level.parts * level.capacity_bytes)} usable)"
        for level in plan.levels
        if level.lacking_bytes
    ]
    return f"must fit the machine, and even for the least policy {' and '.join(lacks)}"


def _lacking_bytes(plan: MemoryPlan) -> tuple[int, int]:
    """At how many levels bytes are lacking, and how many."""
    lacking = [level.lacking_bytes for level in plan.levels]
    return sum(map(bool, lacking)), sum(lacking)


def _remedies(space: Space) -> Iterator[str]:
    """Changes of one thing, or of both memories, each of which makes some policy fit."""
    profile = space.profile
    host = "" if profile.unified_memory else _least_memory(space, "--cpu-memory")
    gpu = _least_memory(space, "--gpu-memory") if profile.has_gpu else ""
    yield gpu
    yield host
    if profile.has_accelerator and not host:
        yield _both_memories(space, gpu)
    if FORMATS[space.dtype].bytes_of(1) > FORMATS[profile.default_dtype].bytes_of(1):
        smaller = replace(space, dtype=profile.default_dtype)
        yield f"--dtype {smaller.dtype}" if fits_somehow(smaller) else ""
    yield _more_gpus(space)
    yield _shorter(space)


def _with_memory(space: Space, flag: str, num_bytes: float) -> Space:
    if flag == "--gpu-memory":
        return replace(space, profile=with_memory(space.profile, gpu_memory_bytes=num_bytes))
    return replace(space, profile=with_memory(space.profile, cpu_memory_bytes=num_bytes))


def _least_memory(space: Space, flag: str) -> str:
    """The option with the least memory of one level that is enough; empty if none is."""

    def enough(num_bytes: int) -> bool:
        return fits_somehow(_with_memory(space, flag, num_bytes))

    least = _first(1, MOST_BYTES, enough)
    if least is None:
        return ""
    # More is not always enough where less is: whole experts lie on the GPU, or not.
    while not enough(parse_bytes(at_least_bytes(least))):
        least += least // 200
    return f"{flag} {at_least_bytes(least)}"


def _both_memories(space: Space, gpu_alone: str) -> str:
    """The least GPU memory with which some host is enough, and the least such host.

    Empty if it is hardly less than what is enough alone.
    """
    wide = _with_memory(space, "--cpu-memory", MOST_BYTES)
    gpu = _least_memory(wide, "--gpu-memory")
    if not gpu or (gpu_alone and _read(gpu)[1] > _MUCH_LESS * _read(gpu_alone)[1]):
        return ""
    host = _least_memory(_with_memory(space, *_read(gpu)), "--cpu-memory")
    return f"{gpu} with {host}" if host else ""


def _read(option: str) -> tuple[str, int]:
    flag, _, size = option.partition(" ")
    return flag, parse_bytes(size, flag)


def _first(low: int, high: int, holds: Callable[[int], bool]) -> int | None:
    """The first integer for which something holds that holds for all greater ones.

    Found to a part in a thousand, from above; None if it does not hold for the greatest.
    """
    if not holds(high):
        return None
    while high - low > 1 and high > low * 1.001:
        middle = round((low * high) ** 0.5) if high > 4 * low else (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _more_gpus(space: Space) -> str:
    """The option with the fewest more GPUs of a catalog machine that are enough; or empty."""
    profile = space.profile
    gpus, _, host = profile.name.partition(" on ")
    _, _, card = gpus.partition("x")
    given = given_resources(profile)
    if profile.accelerator != "catalog" or not card or profile.gpus or Resource.GPU_MEMORY in given:
        return ""
    for count in COUNTS:
        if count <= profile.num_gpus:
            continue
        try:
            machine = compose(f"{count}x{card}", host)
        except HrmError:
            return ""
        machine = with_memory(machine, cpu_memory_bytes=given.get(Resource.CPU_MEMORY))
        if fits_somehow(replace(space, profile=machine)):
            return f"--gpus {count}x{card}"
    return ""


def _shorter(space: Space) -> str:
    """The options with the longest prompts that fit; empty if none do."""
    workload = space.workload

    def shorter(longest: int) -> Space:
        mean = min(workload.prompt_len, longest)
        return replace(space, workload=replace(workload, prompt_len=mean, max_prompt_len=longest))

    def too_long(longest: int) -> bool:
        return not fits_somehow(shorter(longest))

    if workload.max_prompt_len < 2 or too_long(1):
        return ""
    first = _first(1, workload.max_prompt_len, too_long)
    if first is None:
        return ""
    longest = first - 1
    while too_long(longest):
        longest -= 1 + longest // 1000
    if longest >= workload.prompt_len:
        return f"--max-prompt-len {longest}"
    return f"--prompt-len {longest} --max-prompt-len {longest}"


# ------------------------------------------------------------------------------ waiting times


def _advice_on_limits(space: Space) -> tuple[str, str]:
    """The same where policies fit, but none answers within the limits."""
    predicted = _quickest(space)
    latency, limits = predicted.latency, space.limits
    waits = (
        ("--max-ttft", limits.max_ttft_s, "first tokens", latency.last_ttft_s),
        ("--max-tpot", limits.max_tpot_s, "a token after the first", latency.tpot_s),
    )
    missed = [
        (flag, allowed_s, what, seconds)
        for flag, allowed_s, what, seconds in waits
        if allowed_s is not None and seconds is not None and seconds > allowed_s
    ]
    told = " and ".join(
        f"{flag} {format_seconds(allowed_s)}, where the quickest that fits takes {format_seconds(seconds)} for {what},"
        for flag, allowed_s, what, seconds in missed
    )
    allow = " and ".join(f"{flag} {_loose(seconds)}" for flag, _, _, seconds in missed)
    told = told.rstrip(",") or "the limits on waiting times"
    return f"must keep {told}", f"allow {allow or 'longer ones'}"


def _loose(seconds: float) -> str:
    """A limit that leaves the search some room."""
    text = at_least_seconds(1.1 * seconds)
    assert parse_seconds(text) >= seconds
    return text


def _quickest(space: Space) -> Estimate:
    """Of the policies of one request that fit, the one that comes nearest to the limits."""
    found: list[Estimate] = []
    for part, grid in _least(replace(space, limits=NO_LIMITS)):
        for index in np.flatnonzero(grid.fits)[:_TRIED]:
            policy = grid.policy(part, int(index))
            found.append(part.predicted(policy))
    return min(found, key=lambda predicted: max(space.limits.overshoot(predicted.latency)))
