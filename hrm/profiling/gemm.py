"""GEMM rates: over tokens at a model's shapes, and the best square one as the ceiling."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import Any, Final, NamedTuple, final

import torch

from hrm.contract.host_kernels import HostKernels
from hrm.formats import FORMATS
from hrm.hardware import Rate
from hrm.model_spec import ModelSpec
from hrm.profiling.timing import Call, Computer, Timing, significant, summarise, time_each
from hrm.units import MIB

QUICK_TOKENS: Final = (1, 4, 16, 64, 256)  # on a CPU; a GPU is soon through those of a full measurement
FULL_TOKENS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
QUICK_SQUARES: Final = (512,)  # sides of the matrices; a GPU's are eight times as long
FULL_SQUARES: Final = (512, 1024, 2048)
QUICK_WEIGHTS: Final = 2**24  # elements of the largest matrix; larger models are scaled down, and multiply slower
FULL_WEIGHTS: Final = 2**26
POOL_BYTES: Final = 64 * MIB  # weights are taken in turn out of so many, as experts are
MAX_POOL: Final = 16


@dataclass(frozen=True, slots=True)
class GemmShape:
    """A weight matrix that tokens are multiplied with."""

    inputs: int
    outputs: int


class Shapes(NamedTuple):
    """Shapes of an expert's w13 and w2, and a note saying whose they are."""

    of_expert: tuple[GemmShape, GemmShape]
    note: str


def model_shapes(model: ModelSpec | None, *, quick: bool, scale_down: bool = True) -> Shapes:
    """Those of a model, or of some expert if there is none.

    Large models are scaled down, hidden and intermediate size alike, so that a CPU gets through.
    """
    name, hidden, inner = "a 1024 x 3584 expert", 1024, 3584
    if model is not None:
        name, hidden, inner = model.name, model.hidden_size, model.intermediate_size
    limit, factor = (QUICK_WEIGHTS if quick else FULL_WEIGHTS), 1
    while scale_down and 2 * (hidden // factor) * (inner // factor) > limit:
        factor *= 2
    note = f"shapes of {name}" + (f", sides divided by {factor}" if factor > 1 else "")
    hidden, inner = hidden // factor, inner // factor
    return Shapes((GemmShape(hidden, 2 * inner), GemmShape(inner, hidden)), note)


def gemm_rate(
    dtype: str, shapes: Shapes, computer: Computer, *, quick: bool, budget_s: float, launch_s: float, packed: str = ""
) -> Rate:
    """FLOP/s of `dtype`: achieved as a curve over tokens at `shapes`, ceiling at its best.

    With weights in a `packed` format, if one is told, which the kernels must have; then there are no squares.

    The launch latency is taken off, as plans count it apart. Inputs are random, and weights cold
    as far as the cache is smaller than a pool of them. Squares that do not fit are left out. Kernels
    multiply tokens with the shapes; torch does if there are none, and always the squares.
    """
    device, kernels = computer.device, computer.kernels
    tokens = QUICK_TOKENS if quick and device == "cpu" else FULL_TOKENS
    squares = () if packed else QUICK_SQUARES if quick else FULL_SQUARES
    if device != "cpu":
        squares = tuple(8 * side for side in squares)
    squares = tuple(side for side in squares if FORMATS[dtype].bytes_of(3, side, side) <= computer.most_bytes)
    pools = {shape: _Pool(dtype, shape, device, kernels, packed) for shape in shapes.of_expert}
    calls: dict[tuple[int, GemmShape], Call] = {
        (count, shape): pools[shape].multiply(count, kernels) for count in tokens for shape in shapes.of_expert
    }
    for side in squares:
        square = GemmShape(side, side)
        calls[side, square] = _Pool(dtype, square, device).multiply(side)
    with torch.inference_mode():
        taken = time_each(calls, budget_s=budget_s, sampler=computer.sampler)
    timings = {key: summarise(seconds).less(launch_s) for key, seconds in taken.items()}
    both = {count: _sum([timings[count, shape] for shape in shapes.of_expert]) for count in tokens}
    flops_a_token = sum(2.0 * shape.inputs * shape.outputs for shape in shapes.of_expert)
    rates = {count: count * flops_a_token / both[count].median_s for count in tokens}
    best = max(rates, key=lambda count: rates[count])
    note = f"{shapes.note}; best at {best} tokens"
    note += f"; weights in {packed}" if packed else ""
    note += f"; {kernels.name}" if kernels else ""
    achieved = both[best].rate(best * flops_a_token, note)
    ceiling = achieved
    for side in squares:
        figure = timings[side, GemmShape(side, side)].rate(2.0 * side**3, f"square GEMM of {side}")
        ceiling = max(ceiling, figure, key=lambda candidate: candidate.value)
    curve = tuple((float(count), significant(rate)) for count, rate in rates.items())
    return Rate(ceiling=ceiling, achieved=replace(achieved, curve=curve))


def _sum(timings: Sequence[Timing]) -> Timing:
    """One after the other."""
    return Timing(
        sum(timing.median_s for timing in timings),
        sum(timing.p20_s for timing in timings),
        sum(timing.p80_s for timing in timings),
        min(timing.samples for timing in timings),
    )


@final
class _Pool:
    """Weight matrices of one shape that are multiplied with in turn, as experts are."""

    def __init__(
        self, dtype: str, shape: GemmShape, device: str, kernels: HostKernels | None = None, packed: str = ""
    ) -> None:
        self.kind: torch.dtype = getattr(torch, dtype)
        self.shape, self.device = shape, device
        size = FORMATS[dtype].bytes_of(shape.inputs, shape.outputs)
        copies = max(1, min(MAX_POOL, POOL_BYTES // size))
        if packed:
            assert kernels is not None, "packed weights are of kernels that take them"
            assert kernels.pack is not None, kernels.name
            self.weights: Iterator[Any] = cycle(
                [kernels.pack(shape.outputs, shape.inputs, packed) for _ in range(4 * copies)]  # of fewer bytes
            )
            return
        first = torch.randn(shape.outputs, shape.inputs, device=device).to(self.kind)
        self.weights = cycle([first, *(first.clone() for _ in range(copies - 1))])

    def multiply(self, tokens: int, kernels: HostKernels | None = None) -> Call:
        """A call that multiplies so many random tokens with the next matrix."""
        x = torch.randn(tokens, self.shape.inputs, device=self.device).to(self.kind)
        out = torch.empty(tokens, self.shape.outputs, dtype=self.kind, device=self.device)

        def call() -> None:
            torch.mm(x, next(self.weights).T, out=out)

        def call_kernels(kernels: HostKernels) -> None:
            kernels.multiply(x, next(self.weights), out)

        return call if kernels is None else partial(call_kernels, kernels)
