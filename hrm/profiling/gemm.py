"""GEMM rates: over tokens at a model's shapes, and the best square one as the ceiling."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Final

import torch

from hrm.hardware import Rate
from hrm.model_spec import ModelSpec
from hrm.profiling.timing import Call, Sampler, Timing, significant, time_call
from hrm.units import DTYPE_BYTES, MIB

QUICK_TOKENS: Final = (1, 4, 16, 64, 256)
FULL_TOKENS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
QUICK_WEIGHTS: Final = 2**22  # elements of the largest matrix; larger models are scaled down
FULL_WEIGHTS: Final = 2**26
POOL_BYTES: Final = 64 * MIB  # weights are taken in turn out of so many, as experts are
MAX_POOL: Final = 16


@dataclass(frozen=True, slots=True)
class GemmShape:
    """A weight matrix that tokens are multiplied with."""

    inputs: int
    outputs: int


def model_shapes(
    model: ModelSpec | None, *, quick: bool, scale_down: bool = True
) -> tuple[tuple[GemmShape, GemmShape], str]:
    """Shapes of an expert's w13 and w2, and a note saying whose they are.

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
    return (GemmShape(hidden, 2 * inner), GemmShape(inner, hidden)), note


def gemm_rate(
    dtype: str,
    *,
    shapes: Sequence[GemmShape],
    shapes_note: str,
    quick: bool,
    budget_s: float,
    launch_s: float,
    device: str = "cpu",
    sampler: Sampler | None = None,
) -> Rate:
    """FLOP/s of `dtype`: achieved as a curve over tokens at `shapes`, ceiling at its best.

    The launch latency is taken off, as plans count it apart. Inputs are random, and weights cold
    as far as the cache is smaller than a pool of them.
    """
    tokens = QUICK_TOKENS if quick else FULL_TOKENS
    squares = (512,) if quick else (512, 1024, 2048)
    if device != "cpu":
        squares = tuple(8 * side for side in squares)
    share_s = budget_s / (len(tokens) * len(shapes) + len(squares))
    curve: list[tuple[float, float]] = []
    timings: list[Timing] = []
    for count in tokens:
        flops, total = 0.0, Timing(0, 0, 0, 0)
        for shape in shapes:
            call = _multiply(dtype, count, shape, device)
            timing = _timed(call, share_s, launch_s, sampler)
            flops += 2.0 * count * shape.inputs * shape.outputs
            total = Timing(
                total.median_s + timing.median_s,
                total.p20_s + timing.p20_s,
                total.p80_s + timing.p80_s,
                timing.samples,
            )
        curve.append((float(count), significant(flops / total.median_s)))
        timings.append(total)
    best = max(range(len(curve)), key=lambda index: curve[index][1])
    work = curve[best][1] * timings[best].median_s
    achieved = timings[best].rate(work, f"{shapes_note}; best at {tokens[best]} tokens")
    ceiling = achieved
    for side in squares:
        square = GemmShape(side, side)
        timing = _timed(_multiply(dtype, side, square, device), share_s, launch_s, sampler)
        figure = timing.rate(2.0 * side**3, f"square GEMM of {side}")
        ceiling = max(ceiling, figure, key=lambda candidate: candidate.value)
    return Rate(ceiling=ceiling, achieved=replace(achieved, curve=tuple(curve)))


def _timed(call: Call, budget_s: float, launch_s: float, sampler: Sampler | None) -> Timing:
    with torch.inference_mode():
        return time_call(call, budget_s=budget_s, sampler=sampler).less(launch_s)


def _multiply(dtype: str, tokens: int, shape: GemmShape, device: str) -> Call:
    kind: torch.dtype = getattr(torch, dtype)
    size = shape.inputs * shape.outputs * DTYPE_BYTES[dtype]
    pool_size = max(1, min(MAX_POOL, POOL_BYTES // size))
    x = torch.randn(tokens, shape.inputs, device=device).to(kind)
    out = torch.empty(tokens, shape.outputs, dtype=kind, device=device)
    first = torch.randn(shape.outputs, shape.inputs, device=device).to(kind)
    pool = cycle([first.T, *(first.clone().T for _ in range(pool_size - 1))])

    def call() -> None:
        torch.mm(x, next(pool), out=out)

    return call
