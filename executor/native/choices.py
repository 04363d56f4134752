"""What is chosen of scores, experts and tokens, and rows that are put into a cache or elsewhere.

T tokens, E experts, K experts per token, R requests, V vocab; X elements of a row of a cache.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from executor.native.compiled import DTYPES, module
from executor.native.experts import Router, Routing, Scores
from executor.native.mixers import MixerKernels

_GROUPS: Final = 64  # of experts, at most


@dataclass(frozen=True, slots=True)
class ChoiceKernels(MixerKernels):
    """Those that mix tokens, and these."""

    def takes_append(self, cache_CX: Tensor, rows_RX: Tensor, places_R: Tensor) -> bool:
        """Whether `append` can copy this; torch does it otherwise."""
        return (
            cache_CX.is_cpu
            and rows_RX.dtype is cache_CX.dtype
            and cache_CX.is_contiguous()
            and rows_RX.stride(-1) == 1
            and places_R.dtype is torch.int64
            and places_R.is_contiguous()
        )

    def append(self, cache_CX: Tensor, rows_RX: Tensor, places_R: Tensor) -> None:
        """Copy each of the rows to its place among those of the cache."""
        module().append(
            to_address=cache_CX.data_ptr(),
            row_bytes=rows_RX.shape[1] * rows_RX.itemsize,
            num_rows=cache_CX.shape[0],
            from_address=rows_RX.data_ptr(),
            stride=rows_RX.stride(0) * rows_RX.itemsize,
            rows=places_R.data_ptr(),
            tokens=rows_RX.shape[0],
        )

    @staticmethod
    def takes_whole(*tensors: Tensor) -> bool:
        """Whether `clear` and `put` can write these, and `add` if they are numbers to compute with."""
        first = tensors[0]
        return all(
            one.is_cpu and one.is_contiguous() and one.dtype is first.dtype and one.shape == first.shape
            for one in tensors
        )

    def clear(self, out: Tensor) -> None:
        """Make it zeros."""
        module().clear(to_address=out.data_ptr(), num_bytes=out.nbytes)

    def put(self, out: Tensor, x: Tensor) -> None:
        """Copy where it will be read soon."""
        module().put(to_address=out.data_ptr(), from_address=x.data_ptr(), num_bytes=x.nbytes)

    def add(self, out: Tensor, x: Tensor) -> None:
        """Add element by element, each sum rounded once."""
        module().add(
            path=self.path,
            dtype=DTYPES[out.dtype],
            to_address=out.data_ptr(),
            from_address=x.data_ptr(),
            count=x.numel(),
            threads=torch.get_num_threads(),
        )

    def takes_choice(self, logits_TE: Tensor, correction_E: Tensor | None, groups: int) -> bool:
        """Whether `choose_experts` can choose by these; torch does it otherwise."""
        alike = correction_E is None or (correction_E.dtype is logits_TE.dtype and correction_E.is_contiguous())
        return (
            logits_TE.is_cpu and logits_TE.dtype in DTYPES and logits_TE.stride(-1) == 1 and alike and groups <= _GROUPS
        )

    def choose_experts(
        self, logits_TE: Tensor, out: Routing, router: Router, correction_E: Tensor | None = None
    ) -> None:
        """Each token's experts of greatest score, these first, and their scores as weights.

        Scores are float32: a softmax of the logits, or each one's sigmoid, to within 2e-6. What is done with them
        `router` says, whose norm is 1 or None. Of equals the first is chosen.
        """
        module().choose_experts(
            path=self.path,
            dtype=DTYPES[logits_TE.dtype],
            tokens=logits_TE.shape[0],
            experts=logits_TE.shape[1],
            chosen=out.weights_TK.shape[1],
            logits=logits_TE.data_ptr(),
            stride=logits_TE.stride(0),
            sigmoid=router.scores is Scores.SIGMOID,
            groups=router.groups,
            chosen_groups=router.chosen_groups,
            best_of_group=router.best_of_group,
            normalised=router.norm is not None,
            scale=router.scale,
            correction=0 if correction_E is None else correction_E.data_ptr(),
            out_weights=out.weights_TK.data_ptr(),
            out_experts=out.experts_TK.data_ptr(),
            threads=torch.get_num_threads(),
        )

    def takes_greatest(self, x_RV: Tensor) -> bool:
        """Whether `greatest` can look through these."""
        return x_RV.is_cpu and x_RV.dtype in DTYPES and x_RV.stride(-1) == 1

    def greatest(self, x_RV: Tensor) -> list[int]:
        """Where the greatest element of each row is, the first of equals; -1 where it is no finite number."""
        found_R = torch.empty(x_RV.shape[0], dtype=torch.int64)
        module().greatest(
            path=self.path,
            dtype=DTYPES[x_RV.dtype],
            rows=x_RV.shape[0],
            width=x_RV.shape[1],
            x=x_RV.data_ptr(),
            stride=x_RV.stride(0),
            out=found_R.data_ptr(),
            threads=torch.get_num_threads(),
        )
        return found_R.tolist()
