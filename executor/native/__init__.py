"""C++ kernels for what the CPU does: attention, products, norms, rotations, experts, copies.

They are there if a C++ compiler built them when the package was installed; otherwise, and with
EXECUTOR_NATIVE=0 in the environment, the same is computed by torch. Of several paths through them,
one for each set of a processor's instructions, the fastest that it has is taken;
EXECUTOR_NATIVE=avx2 (say) takes that one: amx, avx512-bf16, avx512, avx2 or portable. They work in place,
on as many threads as torch may use in the calling one, and without the interpreter's lock. No request's
result depends on what else is computed with it, but as said below, nor on the number of threads.

The path amx, on Linux where the kernel lends AMX's tiles, is avx512 but for what bfloat16 tiles take: products of
more than 8 tokens with a matrix, each expert's tokens by themselves, in sums of another order, and what latent
attention multiplies with its cache, if it has 16 heads or a multiple. Matrices stay as they are stored; packed ones
are written out as bfloat16 for tiles. Tiles of eight bits are not used, as activations never have so few here.
It was tested with the instructions of tiles done in software; no processor with AMX has timed it yet.

Matrices may be packed: weights are multiplied as they are stored. With a few tokens, at most 8, it is their codes
that are multiplied, and the sums of codes that share a scale with it; with more, weights are first written out, as
bfloat16 if the tokens are and the path has dot products or, of more than 8 tokens, tiles of them, else as float32.
So a result may differ in its roundings with how many tokens there are. Before it is rounded itself, it is that of
the weights that are meant in float32 to within 1e-6 of the sum of what is added, as magnitudes, or 2^-8 where
weights are rounded to bfloat16. Codes or scales that are not finite make results of their rows that are not.

T tokens, D hidden, I intermediate, K experts per token; W width and N rows of any other matrix.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from shutil import which
from typing import Final

import torch
from torch import Tensor

from executor.errors import RunError
from executor.formats import Matrix, Packed
from executor.native.choices import ChoiceKernels
from executor.native.compiled import DTYPES, module
from executor.native.experts import SILU, ExpertWeights, Glu, Routing
from hrm.contract.quantising import LEAST_GROUP
from hrm.units import MIB

VARIABLE: Final = "EXECUTOR_NATIVE"

# As they are numbered in `kernels.hpp`.
_CODES: Final = ("fp8", "int8", "int4", "fp4")
_SCALES: Final = ("f32", "bf16", "f16", "e8m0", "e4m3")

_PAST_CACHES_BYTES: Final = 4 * MIB  # less may still be in a cache when it is read


@dataclass(frozen=True, slots=True)
class Kernels(ChoiceKernels):
    """All kernels by one path: those that mix tokens, those that choose, and those below."""

    def takes_experts(self, x_TD: Tensor, routing: Routing, out_TD: Tensor) -> bool:
        """Whether `run_experts` can compute this; it is torch's otherwise."""
        return (
            x_TD.is_cpu
            and x_TD.dtype in DTYPES
            and out_TD.dtype is x_TD.dtype
            and routing.weights_TK.dtype is torch.float32
            and routing.weights_TK.is_contiguous()
            and routing.experts_TK.is_contiguous()
            and x_TD.stride(-1) == out_TD.stride(-1) == 1
        )

    @staticmethod
    def takes_weights(like: ExpertWeights) -> bool:
        """Whether `run_experts` can compute with experts whose matrices are like these."""
        return all(isinstance(matrix, Tensor) or takes_packed(matrix) for matrix in (like.w13, like.w2))

    def run_experts(
        self,
        x_TD: Tensor,
        routing: Routing,
        experts: Sequence[tuple[int, ExpertWeights]],
        out_TD: Tensor,
        scratch: Tensor,
        *,
        max_tokens: int,
        glu: Glu = SILU,
    ) -> tuple[list[int], list[int]]:
        """Add the weighted output of each of `experts`, (index, weights), to `out_TD`.

        Matrices are packed in every expert as they are in the first, and biases, which all experts have or none, are
        of the tokens' dtype; all lie without gaps. The sums are float32, the activations are rounded once.

        `scratch`, flat and float32, holds the activations, `activation_floats` for each token of
        an expert; as many experts as it has room for are computed together. Those of more tokens
        than `max_tokens`, or than it has room for, are left out. Returns how many tokens are routed
        to each expert, up to the last that any is, and the positions in `experts` of those left
        out.
        """
        first, each = experts[0][1], [weights for _, weights in experts]
        return module().run_experts(
            path=self.path,
            dtype=DTYPES[x_TD.dtype],
            hidden=x_TD.shape[1],
            intermediate=first.w2.shape[1],
            num_tokens=x_TD.shape[0],
            experts_per_token=routing.experts_TK.shape[1],
            x=x_TD.data_ptr(),
            x_stride=x_TD.stride(0) * x_TD.itemsize,
            experts=routing.experts_TK.data_ptr(),
            weights=routing.weights_TK.data_ptr(),
            out=out_TD.data_ptr(),
            out_stride=out_TD.stride(0) * x_TD.itemsize,
            scratch=scratch.data_ptr(),
            scratch_floats=scratch.shape[0],
            indices=[index for index, _ in experts],
            w13=[_addresses(one.w13) for one in each],
            w2=[_addresses(one.w2) for one in each],
            packing13=_packing(first.w13),
            packing2=_packing(first.w2),
            bias13=[one.w13_bias.data_ptr() for one in each if one.w13_bias is not None],
            bias2=[one.w2_bias.data_ptr() for one in each if one.w2_bias is not None],
            activation=glu.activation,
            limit=glu.limit,
            weight_on_input=glu.weight_on_input,
            max_tokens=max_tokens,
            threads=torch.get_num_threads(),
        )

    @staticmethod
    def activation_floats(intermediate: int) -> int:
        """Float32 elements that `run_experts` needs for the activations of a token of an expert."""
        return module().activation_floats(intermediate)

    def takes_linear(self, x_TW: Tensor, weight_NW: Matrix, out_TN: Tensor) -> bool:
        """Whether `linear` can compute this; it is torch's otherwise."""
        if isinstance(weight_NW, Tensor):
            return _takes_rows(x_TW, weight_NW, out_TN)
        return takes_packed(weight_NW) and _takes_rows(x_TW, None, out_TN)

    def linear(self, x_TW: Tensor, weight_NW: Matrix, out_TN: Tensor, *, add: bool) -> None:
        """`out = x @ weight.T`, or added to what `out_TN` holds; float32 sums, rounded once."""
        module().linear(
            path=self.path,
            dtype=DTYPES[x_TW.dtype],
            tokens=x_TW.shape[0],
            width=x_TW.shape[1],
            rows=weight_NW.shape[0],
            x=x_TW.data_ptr(),
            x_stride=x_TW.stride(0),
            w=_addresses(weight_NW),
            packing=_packing(weight_NW),
            out=out_TN.data_ptr(),
            out_stride=out_TN.stride(0),
            add=add,
            threads=torch.get_num_threads(),
        )

    def takes_norm(self, x_TD: Tensor, weight_D: Tensor, out_TD: Tensor) -> bool:
        """Whether `rms_norm` can compute this; it is torch's otherwise."""
        if x_TD.ndim > 2 and not (x_TD.ndim == 3 and x_TD.stride(1) == out_TD.stride(1) == x_TD.shape[2]):
            return False
        return _takes_rows(x_TD, weight_D, out_TD)

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, epsilon: float, out_TD: Tensor, *, offset: float = 0.0) -> None:
        """`x / sqrt(mean(x²) + epsilon)`, rounded, times the weight; sums are float32.

        With an `offset`, which is added to the weights, only the product is rounded. Rows may have
        heads, (T, H, d), which lie one after the other and are normed each by itself. `out_TD` may be
        `x_TD`.
        """
        module().rms_norm(
            path=self.path,
            dtype=DTYPES[x_TD.dtype],
            tokens=x_TD.shape[0],
            heads=x_TD.shape[1] if x_TD.ndim == 3 else 1,
            width=x_TD.shape[-1],
            x=x_TD.data_ptr(),
            x_stride=x_TD.stride(0),
            weight=weight_D.data_ptr(),
            offset=offset,
            epsilon=epsilon,
            out=out_TD.data_ptr(),
            out_stride=out_TD.stride(0),
            threads=torch.get_num_threads(),
        )

    def takes_rotation(self, rows_TX: Tensor, positions_T: Tensor) -> bool:
        """Whether `rotate` can compute this; it is torch's otherwise."""
        return (
            rows_TX.is_cpu
            and rows_TX.dtype in DTYPES
            and rows_TX.stride(-1) == 1
            and positions_T.dtype is torch.int64
            and positions_T.is_contiguous()
        )

    def rotate(
        self,
        rows_TX: Tensor,
        heads: int,
        positions_T: Tensor,
        frequencies_h: Tensor,
        *,
        head_dim: int | None = None,
        interleaved: bool = False,
        magnitude: float = 1.0,
    ) -> None:
        """Turn the first `heads` heads of each row in place, in float32 and rounded once.

        Pair i of a head turns by the row's position times `frequencies_h[i]`, float32 and one after
        the other. `head_dim` elements lie from head to head, if not twice as many as there are
        pairs; what comes after the pairs stays. `interleaved` pairs are elements 2i and 2i+1, others
        elements i and i + pairs. What has turned is multiplied by `magnitude`. Rows may lie apart and
        begin anywhere: where what turns comes last, `rows_TX` begins with the first head's.
        """
        pairs = frequencies_h.shape[0]
        module().rotate(
            path=self.path,
            dtype=DTYPES[rows_TX.dtype],
            tokens=rows_TX.shape[0],
            heads=heads,
            head_dim=2 * pairs if head_dim is None else head_dim,
            pairs=pairs,
            interleaved=interleaved,
            magnitude=magnitude,
            rows=rows_TX.data_ptr(),
            stride=rows_TX.stride(0),
            positions=positions_T.data_ptr(),
            frequencies=frequencies_h.data_ptr(),
            threads=torch.get_num_threads(),
        )

    def takes_copy(self, target: Tensor, source: Tensor) -> bool:
        """Whether `copy` can copy this, and gains by it; it is torch's otherwise."""
        return (
            source.nbytes >= _PAST_CACHES_BYTES
            and target.is_cpu
            and source.is_cpu
            and target.dtype is source.dtype
            and target.shape == source.shape
            and target.is_contiguous()
            and source.is_contiguous()
        )

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy to other memory past the caches, so that what is written is not read first."""
        module().copy(
            path=self.path,
            to_address=target.data_ptr(),
            from_address=source.data_ptr(),
            num_bytes=source.nbytes,
            threads=torch.get_num_threads(),
        )

    def read(self, memory: Tensor) -> None:
        """Read all of `memory` and do nothing with it: the roof of everything above."""
        module().read(
            path=self.path, from_address=memory.data_ptr(), num_bytes=memory.nbytes, threads=torch.get_num_threads()
        )


def _takes_rows(x: Tensor, weight: Tensor | None, out: Tensor) -> bool:
    """Whether rows of `x` can be turned into rows of `out` by a weight, if it is given."""
    return (
        x.is_cpu
        and x.dtype in DTYPES
        and out.dtype is x.dtype
        and (weight is None or (weight.dtype is x.dtype and weight.is_contiguous()))
        and x.stride(-1) == out.stride(-1) == 1
    )


def takes_packed(matrix: Packed) -> bool:
    """Whether the kernels multiply with a packed matrix, or several: columns have to be in their order."""
    form = matrix.format
    return (
        form.columns % LEAST_GROUP == 0
        and not form.ordered
        and all(part.is_cpu and part.is_contiguous() for part in matrix.parts.values())
    )


def _addresses(matrix: Matrix) -> tuple[int, int, int, int]:
    """Where numbers or codes, scales, zero points and scales of rows lie; 0 is nowhere."""
    if isinstance(matrix, Tensor):
        return matrix.data_ptr(), 0, 0, 0
    zeros, row_scales = matrix.zeros, matrix.row_scales
    return (
        matrix.codes.data_ptr(),
        matrix.scales.data_ptr(),
        0 if zeros is None else zeros.data_ptr(),
        0 if row_scales is None else row_scales.data_ptr(),
    )


def _packing(matrix: Matrix) -> tuple[int, int, int, int] | None:
    """How it is packed, in the numbers of `kernels.hpp`."""
    if isinstance(matrix, Tensor):
        return None
    form = matrix.format
    return _CODES.index(form.code), _SCALES.index(form.scale), form.rows, form.columns


def paths() -> list[str]:
    """The paths that this processor can take, the fastest first; none if nothing was built."""
    compiled = module()
    return compiled.paths() if compiled else []


@cache
def _chosen() -> Kernels | None:
    wanted, possible = os.environ.get(VARIABLE, "1"), paths()
    if wanted == "0" or (wanted == "1" and not possible):
        return None
    if wanted == "1":
        return Kernels(possible[0])
    if wanted not in possible:
        raise RunError(
            VARIABLE, wanted, f"must be one of {', '.join(['0', '1', *possible])} here", "correct it or unset it"
        )
    return Kernels(wanted)


_override: list[Kernels | None] = []


def kernels() -> Kernels | None:
    """The kernels to be used, or None if everything is torch's.

    Raises RunError if EXECUTOR_NATIVE names a path that is not there.
    """
    return _override[-1] if _override else _chosen()


@contextmanager
def using(these: Kernels | None) -> Iterator[None]:
    """Within it `kernels()` are these, in every thread: for tests and benchmarks."""
    _override.append(these)
    try:
        yield
    finally:
        _override.pop()


def description() -> str:
    """In words, what computes on the CPU."""
    if made := kernels():
        return f"native ({made.path})"
    if not paths():
        compilers = os.environ.get("CXX", ""), "c++", "g++", "clang++"
        has_compiler = any(which(name) for name in compilers if name)
        why = "`pip install --verbose` shows the compiler's error" if has_compiler else "there is no C++ compiler"
        return f"torch, several times slower (the native kernels were not built: {why})"
    return f"torch ({VARIABLE}=0)"
