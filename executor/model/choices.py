"""What a run has to know of its machine before it computes: where the native kernels are faster than torch."""

from collections.abc import Iterable
from itertools import chain

import torch

from executor.backends.base import in_thread_of_its_own
from executor.model.attention import PREFILL_ATTENTION
from executor.model.crossings import Work, settle
from executor.model.experts import EXPERTS
from executor.model.linear import PACKED_PRODUCTS, PRODUCTS
from hrm.layers import GroupedQueryAttention
from hrm.model_spec import ModelSpec


def settle_choices(spec: ModelSpec, dtype: torch.dtype, threads: Iterable[int]) -> None:
    """Measure, if nobody did, what the lanes of a run that have so many threads will choose between."""
    works = _works(spec)
    for count in sorted(set(threads)):
        settle(works, dtype, count)


def choices_of(dtypes: Iterable[str], threads: int, *, packed: bool) -> dict[str, int]:
    """All that a profile keeps of so many threads."""
    works = (PRODUCTS, EXPERTS, PREFILL_ATTENTION, *((PACKED_PRODUCTS,) if packed else ()))

    def measure() -> dict[str, int]:
        found = (settle(works, getattr(torch, dtype), threads) for dtype in dtypes)
        return dict(chain.from_iterable(each.items() for each in found))

    return in_thread_of_its_own(measure)


def _works(spec: ModelSpec) -> list[Work]:
    works = [PRODUCTS]
    if spec.num_expert_layers:
        works.append(EXPERTS)
    if any(isinstance(kind.mixer, GroupedQueryAttention) for kind in spec.layer_kinds()):
        works.append(PREFILL_ATTENTION)
    if spec.largest_packed:
        works.append(PACKED_PRODUCTS)
    return works
