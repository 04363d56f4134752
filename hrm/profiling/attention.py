"""Decode attention: the rate at which its kernel reads the KV cache, over context lengths.

R requests, C tokens of context, G kv heads, d head_dim, H/G query heads a kv head.
"""

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch.nn.functional import scaled_dot_product_attention

from hrm.hardware import Rate
from hrm.model_spec import ModelSpec
from hrm.profiling.link import fit_link
from hrm.profiling.timing import Call, Sampler, significant, time_call
from hrm.units import MIB, format_seconds

QUICK_CONTEXTS: Final = (128, 512, 2048)
FULL_CONTEXTS: Final = (64, 128, 256, 512, 1024, 2048, 4096)
MAX_REQUESTS: Final = 64


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of an attention layer."""

    query: int = 32
    kv: int = 8
    head_dim: int = 128

    @classmethod
    def of(cls, model: ModelSpec | None) -> "Heads":
        """Those of the model, or of a Mixtral 8x7B."""
        return cls(model.num_heads, model.num_kv_heads, model.head_dim) if model else cls()


def attention_rate(
    dtype: str,
    *,
    heads: Heads,
    quick: bool,
    budget_s: float,
    device: str = "cpu",
    sampler: Sampler | None = None,
) -> Rate:
    """KV bytes a second, apart from what each request costs however short its context is.

    The cache holds a token's keys and then its values, and requests are computed one by one.
    """
    contexts = QUICK_CONTEXTS if quick else FULL_CONTEXTS
    cache_bytes = (64 if quick else 256) * MIB
    kind: torch.dtype = getattr(torch, dtype)
    per_token = 2 * heads.kv * heads.head_dim * kind.itemsize
    points: list[tuple[float, float]] = []
    timing = None
    for context in contexts:
        requests = max(1, min(MAX_REQUESTS, cache_bytes // (context * per_token)))
        call = attention_call(kind, heads, requests, context, device)
        with torch.inference_mode():
            timing = time_call(call, budget_s=budget_s / len(contexts), sampler=sampler)
        points.append((float(context * per_token), timing.median_s / requests))
    assert timing is not None
    fit = fit_link(points)
    longest, longest_s = points[-1]
    shape = f"{heads.query} query heads on {heads.kv} of {heads.head_dim}"
    note = f"{dtype}, {shape}, contexts {contexts[0]} to {contexts[-1]}; each request costs"
    note += f" {format_seconds(fit.latency_s)} besides"
    spread = timing.rate(longest * timing.median_s / longest_s, note)
    ratio = fit.bandwidth_bytes_per_s / spread.value
    assert spread.p20 is not None
    assert spread.p80 is not None
    figure = replace(
        spread,
        value=significant(fit.bandwidth_bytes_per_s),
        p20=significant(spread.p20 * ratio),
        p80=significant(spread.p80 * ratio),
        curve=tuple(
            (float(context), significant(size / max(seconds - fit.latency_s, 0.2 * seconds)))
            for context, (size, seconds) in zip(contexts, points, strict=True)
        )
        if fit.worst_miss > 0.10
        else (),
    )
    return Rate(achieved=figure)


def attention_call(
    kind: torch.dtype, heads: Heads, requests: int, context: int, device: str = "cpu"
) -> Call:
    """One step of decode attention for `requests` requests of `context` tokens each."""
    group = heads.query // heads.kv
    cache_C2Gd = torch.randn(
        requests * context, 2, heads.kv, heads.head_dim, device=device
    ).to(kind)  # fmt: skip
    keys_1GCd, values_1GCd = cache_C2Gd.permute(1, 2, 0, 3).unsqueeze(1).unbind()
    queries = torch.randn(requests, 1, heads.kv, group, heads.head_dim, device=device).to(kind)
    outputs = torch.empty_like(queries)

    def call() -> None:
        for index in range(requests):
            k = keys_1GCd.narrow(2, index * context, context)
            v = values_1GCd.narrow(2, index * context, context)
            outputs[index].copy_(scaled_dot_product_attention(queries[index], k, v))

    return call
