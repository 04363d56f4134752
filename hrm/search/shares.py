"""Policies as shares of what fits the machine, so that hardly any that is drawn is wasted."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from random import Random
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hrm.policy import Policy
from hrm.search.constraints import may_meet
from hrm.search.fit import Ints
from hrm.search.grid import ALL_THAT_FIT, Grid, make_grid
from hrm.search.lattice import chunk_ranges, levelled, limits, rounded
from hrm.search.scores import score_of
from hrm.search.space import Kind, KvPlace, Space

CHUNK_STEP: Final = 1.1  # between one chunk that is tried and the next
# To begin with: sizes and numbers of micro-batches, as logarithmic shares of what fits, and chunks
# in lengths of the longest prompt.
_FILLING: Final = ((1.0, 0.0, 4), (1.0, 1.0, 1), (1.0, 0.0, 64), (1.0, 1.0, 16), (0.5, 0.5, 4), (0.0, 1.0, 1))
_RESIDENT: Final = (1.0, 0.5)  # shares of the experts that stay beside one micro-batch
_STEPS: Final = (0.02, 0.1, 0.3)  # by which shares are changed

Parameters = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """What limits sizes and numbers beside one another."""

    kind: Kind
    chunk: int
    dense: bool
    gpu_prefill: int

    def of(self, grid: Grid) -> NDArray[np.bool_]:
        """Which candidates are of this setting."""
        return (grid.resident_dense == self.dense) & (grid.gpu_prefill_ffn == self.gpu_prefill)


class Decoder:
    """Turns shares of what fits into policies."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.dense = (True, False) if space.profile.has_accelerator else (True,)
        self.prefill = space.prefill_devices(0)
        self.chunks = sorted(c for some in chunk_ranges(space) for c in some.spaced(CHUNK_STEP))
        self._known: dict[tuple[Setting, int], int] = {}
        self.kinds = {
            name: kind
            for name, kind in ((_name(kind), kind) for kind in space.kinds())
            if any(
                self._most_sizes(Setting(kind, self.chunks[0], dense, prefill))
                for dense in self.dense
                for prefill in space.prefill_devices(kind.gpu_ffn)
            )
        }

    def first(self, count: int) -> list[Parameters]:
        """Policies that fill the memories in some way, those of the highest closed form.

        First come those that may meet the limits on waiting times.
        """
        scored: dict[Policy, tuple[bool, float, Parameters]] = {}
        for parameters in self._filling():
            policy = self.policy(parameters)
            if policy is not None and policy not in scored:
                scored[policy] = may_meet(self.space, policy), score_of(self.space, policy), parameters
        ranked = sorted(scored.values(), key=lambda item: item[:2], reverse=True)
        return [parameters for _, _, parameters in ranked[:count]]

    def _filling(self) -> Iterator[Parameters]:
        for size, number, chunk in _FILLING:
            share = self._chunk_share(chunk)
            for name, kind in self.kinds.items():
                prefill = self.space.prefill_devices(kind.gpu_ffn)
                for residents, device in product((1.0,) if kind.gpu_ffn else (1.0, 0.0), prefill):
                    yield {
                        "kind": name,
                        "size": size,
                        "number": number,
                        "kv": 0.5,
                        "residents": residents,
                        "chunk": share,
                        "dense": True,
                        "prefill": device,
                    }
        for share in _RESIDENT:
            for name, kind in self.kinds.items():
                yield {
                    "kind": name,
                    "size": self._share_with_residents(kind, share),
                    "number": 0.0,
                    "kv": 0.5,
                    "residents": 1.0,
                    "chunk": 0.0,
                    "dense": True,
                    "prefill": self.prefill[0],
                }

    def _chunk_share(self, prompts: int) -> float:
        """The longest chunk of no more than so many of the longest prompt, as a share."""
        most = prompts * self.space.workload.max_prompt_len
        shorter = sum(chunk <= most for chunk in self.chunks) - 1
        return shorter / max(len(self.chunks) - 1, 1)

    def policy(self, parameters: Parameters) -> Policy | None:
        """The policy that the parameters mean; None if even the least of its kind does not fit."""
        kind = self.kinds[parameters["kind"]]
        longest = round(parameters["chunk"] * (len(self.chunks) - 1))
        placed = parameters["dense"], 1 if kind.gpu_ffn else parameters["prefill"]
        settings = (Setting(kind, chunk, *placed) for chunk in reversed(self.chunks[: longest + 1]))
        setting = next((setting for setting in settings if self._most_sizes(setting)), None)
        if setting is None:
            return None
        size = _logarithmic(parameters["size"], self._most_sizes(setting))
        most_numbers = self._most_numbers(setting, size)
        if not most_numbers:
            return None
        least = 2 if kind.kv is KvPlace.SOME else 1
        number = max(_logarithmic(parameters["number"], most_numbers), least)
        requests = self.space.workload.num_requests
        ((size, number),) = levelled(np.array([[size, number]]), requests).tolist()
        if number < least:
            return None
        on_gpu = number if kind.kv is KvPlace.ALL else 0
        if kind.kv is KvPlace.SOME:
            most = _largest(number - 1, lambda k: self._fit(setting, size, number, k))
            on_gpu = 1 + round(parameters["kv"] * (most - 1))
        parts = round(parameters["residents"] * ALL_THAT_FIT)
        place = np.array([[size, number, on_gpu, parts, setting.chunk]])
        grid = make_grid(self.space, kind, place)
        fitting = np.flatnonzero(grid.fits & setting.of(grid))
        return grid.policy(self.space, int(fitting[0])) if len(fitting) else None

    def changed(self, parameters: Parameters, random: Random) -> Parameters:
        """The parameters with some of them changed, mostly a little."""
        changed, step = dict(parameters), random.gauss(0, random.choice(_STEPS))
        names = random.sample(sorted(changed), random.randint(1, 3))
        steps = {name: random.gauss(0, random.choice(_STEPS)) for name in names}
        if random.random() < 0.2:  # as many requests in fewer or more micro-batches
            steps = {"size": step, "number": -step}
        if random.random() < 0.3:  # far away
            steps = {name: random.uniform(-1, 1) for name in steps}
        for name, moved in steps.items():
            match name:
                case "kind":
                    changed[name] = random.choice(list(self.kinds))
                case "dense":
                    changed[name] = random.choice(self.dense)
                case "prefill":
                    changed[name] = random.choice(self.prefill)
                case _:
                    changed[name] = min(max(changed[name] + moved, 0.0), 1.0)
        return changed

    def _share_with_residents(self, kind: Kind, share: float) -> float:
        """The size, as a share, of one micro-batch beside which that share of experts fits."""
        gpu_prefill = self.space.prefill_devices(kind.gpu_ffn)[0]
        setting = Setting(kind, self.chunks[0], dense=True, gpu_prefill=gpu_prefill)
        number = 1 + (kind.kv is KvPlace.SOME)

        def fit(sizes: Ints) -> NDArray[np.bool_]:
            grid = self._grid(setting, sizes, number, number * (kind.kv is KvPlace.ALL))
            enough = grid.resident_total >= share * self.space.everything
            return (grid.fits & enough)[setting.of(grid)]

        most = self._most_sizes(setting)
        size = _largest(most, fit)
        return math.log(size) / math.log(most) if size > 1 else 0.0

    def _most_sizes(self, setting: Setting) -> int:
        """The largest micro-batch of which as few fit as the kind allows."""
        if (setting, 0) not in self._known:
            number = 1 + (setting.kind.kv is KvPlace.SOME)
            on_gpu = int(setting.kind.kv is KvPlace.ALL)
            self._known[setting, 0] = _largest(limits(self.space)[0], lambda m: self._fit(setting, m, number, on_gpu))
        return self._known[setting, 0]

    def _most_numbers(self, setting: Setting, size: int) -> int:
        """The most micro-batches of a size that fit."""
        if (setting, size) not in self._known:
            on_gpu = int(setting.kind.kv is KvPlace.ALL)
            self._known[setting, size] = _largest(
                limits(self.space)[1], lambda n: self._fit(setting, size, n, on_gpu * n)
            )
        return self._known[setting, size]

    def _fit(self, setting: Setting, size: Ints | int, number: Ints | int, on_gpu: Ints | int) -> NDArray[np.bool_]:
        grid = self._grid(setting, size, number, on_gpu)
        return grid.fits[setting.of(grid)]

    def _grid(self, setting: Setting, size: Ints | int, number: Ints | int, on_gpu: Ints | int) -> Grid:
        columns = np.broadcast_arrays(np.atleast_1d(size), number, on_gpu, ALL_THAT_FIT, setting.chunk)
        return make_grid(self.space, setting.kind, np.column_stack(columns))


def _name(kind: Kind) -> str:
    devices = ("cpu", "gpu")
    return (
        f"attention on {devices[kind.gpu_attention]}, experts on {devices[kind.gpu_ffn]}, "
        f"{kind.kv.name.lower()} of the KV cache on gpu"
    )


def _logarithmic(share: float, most: int) -> int:
    """An integer from 1 to `most`, at a share of the way in the logarithm; 0 if there is none."""
    return round(most**share) if most else 0


def _largest(limit: int, fit: Callable[[Ints], NDArray[np.bool_]]) -> int:
    """The largest integer up to `limit` that fits if all smaller ones do; 0 if 1 does not."""
    if limit < 1:
        return 0
    values = rounded(np.geomspace(1, limit, 48))
    while True:
        fitting = int(np.argmin(np.append(fit(values), False)))
        if fitting == 0:
            return 0
        low = int(values[fitting - 1])
        if fitting == len(values) or values[fitting] == low + 1:
            return low
        values = rounded(np.linspace(low, int(values[fitting]), 48))
