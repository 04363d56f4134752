"""Decode attention: the rate at which its kernel reads the KV cache, over context lengths.

R requests, C tokens of context, G kv heads, d head_dim, H/G query heads a kv head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import Final, final

import torch
from torch.nn.functional import scaled_dot_product_attention

from hrm.contract.host_kernels import HostKernels
from hrm.hardware import Rate
from hrm.layers import GroupedQueryAttention, LatentAttention
from hrm.model_spec import ModelSpec
from hrm.profiling.fit import BENT, fit_groups, fit_link
from hrm.profiling.timing import Call, Computer, measured, significant, summarise, time_each
from hrm.units import GIB, MIB, format_seconds

QUICK_CONTEXTS: Final = (128, 512, 2048)
FULL_CONTEXTS: Final = (64, 128, 256, 512, 1024, 2048, 4096)
QUICK_BATCHES: Final = (1, 16)
FULL_BATCHES: Final = (1, 4, 16, 64)
QUICK_BYTES: Final = 256 * MIB
FULL_BYTES: Final = GIB
TILE_TOKENS: Final = 4096
MAX_WINDOWS: Final = 512


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of an attention layer."""

    query: int = 32
    kv: int = 8
    head_dim: int = 128

    @classmethod
    def of(cls, model: ModelSpec | None) -> "Heads":
        """Those of the model, or of a Mixtral 8x7B."""
        mixer = model.widest_kind.mixer if model else None
        if isinstance(mixer, GroupedQueryAttention):
            return cls(mixer.num_heads, mixer.num_kv_heads, mixer.head_dim)
        if isinstance(mixer, LatentAttention):  # expanded, every head has keys of its own
            return cls(mixer.num_heads, mixer.num_heads, mixer.head_dim)
        return cls()


def attention_rate(
    dtype: str, heads: Heads, computer: Computer, *, quick: bool, budget_s: float, at_once: bool = False
) -> Rate:
    """KV bytes a second, apart from what each request costs however short its context is.

    Measured over contexts and batches. The cache holds a token's keys and then its values, and
    requests are computed one by one, or all of a batch `at_once`, each call with other ones of a
    cache too large to stay in the processor's, as a decode step meets every request once. Kernels
    attend; torch does if there are none.
    """
    kernels = computer.kernels
    contexts = QUICK_CONTEXTS if quick else FULL_CONTEXTS
    batches = QUICK_BATCHES if quick else FULL_BATCHES
    kind: torch.dtype = getattr(torch, dtype)
    cache = KvCache(kind, heads, min(QUICK_BYTES if quick else FULL_BYTES, computer.most_bytes), computer.device)
    call_of = partial(batch_call if at_once else attention_call, cache)
    if kernels is not None:
        call_of = partial(kernels_call, kernels, cache)
    calls = {
        (context, batch): call_of(min(batch, cache.tokens // context), context)
        for context in contexts
        for batch in batches
        if context <= cache.tokens
    }
    with torch.inference_mode():
        taken = time_each(calls, budget_s=budget_s, sampler=computer.sampler)
    samples = {
        (context, batch): [s / min(batch, cache.tokens // context) for s in seconds]
        for (context, batch), seconds in taken.items()
    }
    largest = max(batches)
    of_context = {
        float(context * cache.token_bytes): seconds for (context, batch), seconds in samples.items() if batch == largest
    }
    points = [(size, summarise(seconds).median_s) for size, seconds in of_context.items()]
    fit = fit_link(points)
    bandwidths = [one.bandwidth_bytes_per_s for one in fit_groups(of_context)]
    shape = f"{heads.query} query heads on {heads.kv} of {heads.head_dim}"
    note = f"{dtype}, {shape}, contexts {contexts[0]} to {contexts[-1]}"
    note += f"; {kernels.name}" if kernels else ""
    note += "; each request costs"
    note += f" {format_seconds(fit.latency_s)} besides{_over_batches(samples, batches)}"
    figure = measured(fit.bandwidth_bytes_per_s, bandwidths, note, sum(map(len, of_context.values())))
    if fit.worst_miss > BENT:
        curve = tuple(
            (size / cache.token_bytes, significant(size / max(s - fit.latency_s, 0.2 * s))) for size, s in points
        )
        figure = replace(figure, curve=curve)
    return Rate(achieved=figure)


def _over_batches(samples: dict[tuple[int, int], list[float]], batches: Sequence[int]) -> str:
    """What a request of the longest context takes in smaller batches, beside the largest."""
    longest = max(context for context, _ in samples)
    seconds = {batch: summarise(samples[longest, batch]).median_s for batch in batches}
    others = [
        f"{seconds[max(batches)] / seconds[batch]:.0%} in batches of {batch}"
        for batch in batches
        if batch != max(batches)
    ]
    return f"; in batches of {max(batches)}, at context {longest} " + ", ".join(others)


@final
class KvCache:
    """Keys and values of many tokens, a token's keys and then its values."""

    def __init__(self, kind: torch.dtype, heads: Heads, num_bytes: float, device: str) -> None:
        self.kind, self.heads, self.device = kind, heads, device
        self.token_bytes = 2 * heads.kv * heads.head_dim * kind.itemsize
        self.tokens = max(*FULL_CONTEXTS, int(num_bytes // self.token_bytes))
        row = (2, heads.kv, heads.head_dim)
        tile = torch.randn(min(self.tokens, TILE_TOKENS), *row, device=device).to(kind)
        self.data_C2Gd = tile.repeat(-(-self.tokens // len(tile)), 1, 1, 1)[: self.tokens]

    def windows(self, tokens: int) -> list[torch.Tensor]:
        """The cache in pieces of so many tokens."""
        whole = min(MAX_WINDOWS, self.tokens // tokens)
        used = self.data_C2Gd[: whole * tokens]
        return list(used.view(whole, tokens, *used.shape[1:]).unbind())


def attention_call(cache: KvCache, requests: int, context: int) -> Call:
    """One step of decode attention for the next `requests` requests of `context` tokens each."""
    heads = cache.heads
    group = heads.query // heads.kv
    windows = cycle([window.permute(1, 2, 0, 3).unsqueeze(1).unbind() for window in cache.windows(requests * context)])
    shape = (requests, 1, heads.kv, group, heads.head_dim)
    queries = torch.randn(shape, device=cache.device).to(cache.kind)
    outputs = torch.empty_like(queries)

    def call() -> None:
        keys_1GCd, values_1GCd = next(windows)
        for index in range(requests):
            k = keys_1GCd.narrow(2, index * context, context)
            v = values_1GCd.narrow(2, index * context, context)
            outputs[index].copy_(scaled_dot_product_attention(queries[index], k, v))

    return call


def batch_call(cache: KvCache, requests: int, context: int) -> Call:
    """The same in one kernel, which a GPU needs: one request does not keep it busy."""
    heads = cache.heads
    windows = cycle(
        [
            window.view(requests, context, *window.shape[1:]).permute(2, 0, 3, 1, 4).unbind()
            for window in cache.windows(requests * context)
        ]
    )
    shape = (requests, heads.kv, heads.query // heads.kv, heads.head_dim)
    queries = torch.randn(shape, device=cache.device).to(cache.kind)

    def call() -> torch.Tensor:
        keys_RGCd, values_RGCd = next(windows)
        return scaled_dot_product_attention(queries, keys_RGCd, values_RGCd)

    return call


def kernels_call(kernels: HostKernels, cache: KvCache, requests: int, context: int) -> Call:
    """The same by the kernels handed in."""
    heads = cache.heads
    windows = cycle(cache.windows(requests * context))
    queries = torch.randn(requests, heads.query * heads.head_dim, device=cache.device).to(cache.kind)
    out = torch.empty_like(queries)
    starts = [index * context for index in range(requests)]
    lengths = [context] * requests

    def call() -> None:
        kernels.attend(queries, next(windows), starts, lengths, out)

    return call
