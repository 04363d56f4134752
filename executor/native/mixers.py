"""What mixes a request's tokens: attention, latent attention, and the gated delta rule.

R requests, C tokens of a cache, H heads, G kv heads, d head_dim, Q = H*d. Of latent attention: n and p
elements of a head's query without and with rotation, v of its value, L of a token in the cache.
Of the delta rule: H value heads, X channels of the convolution, k its kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from executor.native.compiled import DTYPES, module
from executor.native.tape import checked
from hrm.formats import scales_at

_HEAD_DIM_UNIT: Final = 8
CODES: Final = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}  # of a quantised cache's rows, as `cached.hpp` has them


@dataclass(frozen=True, slots=True)
class Logits:
    """What softmax is taken of: products times `scale`, 1/sqrt(d) if it is None.

    A `softcap` makes of them `softcap * tanh(logit / softcap)`. `sinks_H`, float32, are one more logit of each head,
    which has no value.
    """

    scale: float | None = None
    softcap: float = 0.0
    sinks_H: Tensor | None = None  # noqa: N815


PLAIN: Final = Logits()


class SplitQuery(NamedTuple):
    """The parts of a query of latent attention without and with rotation: `q[..., :n]` and `q[..., n:]` will do."""

    nope_RHn: Tensor  # noqa: N815
    rope_RHp: Tensor  # noqa: N815


@dataclass(frozen=True, slots=True)
class DeltaStep:
    """One new token of each request for the gated delta rule, and what it meets.

    X of `qkv_RX` are the queries and keys of all key heads and the values of all value heads, several of which in a
    row share a key head. `states`, float32, are rows (H, key_dim, value_dim), and `conv_states` rows (k - 1, X) of the
    tokens before, the earliest first; rows may lie apart.
    """

    qkv_RX: Tensor  # noqa: N815
    convolution_Xk: Tensor  # noqa: N815
    conv_states: Tensor
    states: Tensor
    a_RH: Tensor  # noqa: N815
    b_RH: Tensor  # noqa: N815
    log_rate_H: Tensor  # noqa: N815
    step_bias_H: Tensor  # noqa: N815


@dataclass(frozen=True, slots=True)
class MixerKernels:
    """The kernels by one path, such as avx512-bf16."""

    path: str

    def takes_attention(
        self,
        queries: Tensor,
        cache_C2Gd: Tensor,
        out: Tensor,
        sinks_H: Tensor | None = None,
        *,
        heads: tuple[int, int] | None = None,
    ) -> bool:
        """Whether `decode_attention` can compute this; it is torch's otherwise."""
        _, head_dim = heads or cache_C2Gd.shape[-2:]
        return (
            cache_C2Gd.is_cpu
            and out.dtype in DTYPES
            and queries.dtype is out.dtype
            and (cache_C2Gd.dtype is out.dtype or cache_C2Gd.dtype in CODES)
            and head_dim % _HEAD_DIM_UNIT == 0
            and cache_C2Gd.is_contiguous()
            and queries.stride(-1) == out.stride(-1) == 1
            and (sinks_H is None or _is_float_vector(sinks_H))
        )

    def decode_attention(
        self,
        queries_RX: Tensor,
        cache_C2Gd: Tensor,
        starts: Sequence[int],
        lengths: Sequence[int],
        out_RQ: Tensor,
        logits: Logits = PLAIN,
        *,
        heads: tuple[int, int] | None = None,
    ) -> None:
        """Attention of one new token per request over `lengths[r]` tokens from `starts[r]` on.

        Each row of `queries_RX` begins with the request's queries; rows of it and of `out_RQ` may lie
        apart. Logits and sums are float32. Requests may attend to the same tokens, so those of a prompt
        can each be one, whose stretch begins where its window does and ends with itself.

        A cache may be rows (C, B) of int8 or float8_e4m3fn, as `hrm.formats.KvFormat` lays them out; then
        `heads` are how many KV heads there are and how wide. What its codes mean is rounded to the
        queries' dtype, a tile of tokens at a time.
        """
        kv_heads, head_dim = heads or cache_C2Gd.shape[2:]
        size = out_RQ.itemsize
        num_heads = out_RQ.shape[1] // head_dim
        sinks_H = logits.sinks_H
        assert sinks_H is None or sinks_H.shape[0] == num_heads, (sinks_H, num_heads)
        checked(starts, lengths)
        module().decode_attention(
            path=self.path,
            dtype=DTYPES[out_RQ.dtype],
            heads=num_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5 if logits.scale is None else logits.scale,
            softcap=logits.softcap,
            sinks=0 if sinks_H is None else sinks_H.data_ptr(),
            queries=queries_RX.data_ptr(),
            query_stride=queries_RX.stride(0) * size,
            cache=cache_C2Gd.data_ptr(),
            cache_tokens=cache_C2Gd.shape[0],
            **_coding(cache_C2Gd, (head_dim,) * 2 * kv_heads),
            out=out_RQ.data_ptr(),
            out_stride=out_RQ.stride(0) * size,
            starts=starts,
            lengths=lengths,
            threads=torch.get_num_threads(),
        )

    def takes_latent(self, query: SplitQuery, cache_CL: Tensor, kv_up: Tensor, out_RHv: Tensor) -> bool:
        """Whether `latent_attention` can compute this; it is torch's otherwise."""
        return (
            cache_CL.is_cpu
            and out_RHv.dtype in DTYPES
            and query.nope_RHn.dtype is query.rope_RHp.dtype is kv_up.dtype is out_RHv.dtype
            and (cache_CL.dtype is out_RHv.dtype or cache_CL.dtype in CODES)
            and cache_CL.is_contiguous()
            and kv_up.is_contiguous()
            and query.nope_RHn.stride(-1) == query.rope_RHp.stride(-1) == out_RHv.stride(-1) == 1
            and out_RHv.stride(1) == out_RHv.shape[2]
        )

    def latent_attention(
        self,
        query: SplitQuery,
        cache_CL: Tensor,
        kv_up: Tensor,
        starts: Sequence[int],
        lengths: Sequence[int],
        scale: float,
        out_RHv: Tensor,
    ) -> None:
        """Latent attention of one new token per request over `lengths[r]` rows from `starts[r]` on.

        A row of `cache_CL` is a token's compressed vector of `rank` elements and then its rotary key
        of p, L = rank + p in all. `kv_up`, (H, n + v, rank) or the same rows as one matrix, projects
        the compressed vector to each head's key and then to its value. It is applied to the queries
        and to the outputs instead (arXiv 2405.04434, §2.1.2), which are rounded between the steps.
        A cache of int8 or float8_e4m3fn is rows of codes with a scale for the vector and one for the key.
        Requests, and heads of the queries, may lie apart.
        """
        q_nope_RHn, q_rope_RHp = query
        requests, heads, nope = q_nope_RHn.shape
        rope, value_dim = q_rope_RHp.shape[2], out_RHv.shape[2]
        rank = kv_up.numel() // (heads * (nope + value_dim))
        assert cache_CL.dtype in CODES or rank + rope == cache_CL.shape[1], (rank, rope, cache_CL.shape)
        assert kv_up.numel() == heads * (nope + value_dim) * rank, (kv_up.shape, q_nope_RHn.shape, out_RHv.shape)
        assert requests == len(q_rope_RHp) == len(out_RHv) == len(lengths), (requests, len(lengths))
        checked(starts, lengths)
        module().latent_attention(
            path=self.path,
            dtype=DTYPES[out_RHv.dtype],
            heads=heads,
            nope=nope,
            rope=rope,
            rank=rank,
            value_dim=value_dim,
            scale=scale,
            q_nope=q_nope_RHn.data_ptr(),
            nope_stride=q_nope_RHn.stride(0),
            nope_head_stride=q_nope_RHn.stride(1),
            q_rope=q_rope_RHp.data_ptr(),
            rope_stride=q_rope_RHp.stride(0),
            rope_head_stride=q_rope_RHp.stride(1),
            cache=cache_CL.data_ptr(),
            cache_tokens=cache_CL.shape[0],
            **_coding(cache_CL, (rank, rope)),
            kv_up=kv_up.data_ptr(),
            out=out_RHv.data_ptr(),
            out_stride=out_RHv.stride(0),
            starts=starts,
            lengths=lengths,
            threads=torch.get_num_threads(),
        )

    def takes_gated_delta(self, step: DeltaStep, out_RV: Tensor) -> bool:
        """Whether `gated_delta_step` can compute this; it is torch's otherwise."""
        rows = (step.qkv_RX, step.a_RH, step.b_RH, out_RV)
        return (
            step.states.is_cpu
            and step.states.dtype is torch.float32
            and step.states[:1].is_contiguous()
            and step.conv_states[:1].is_contiguous()
            and step.convolution_Xk.is_contiguous()
            and step.qkv_RX.dtype in DTYPES
            and all(each.dtype is step.qkv_RX.dtype for each in (*rows, step.convolution_Xk, step.conv_states))
            and all(each.stride(-1) == 1 for each in rows)
            and _is_float_vector(step.log_rate_H)
            and _is_float_vector(step.step_bias_H)
        )

    def gated_delta_step(self, step: DeltaStep, rows: Sequence[int], out_RV: Tensor) -> None:
        """One new token of each request through the gated delta rule (arXiv 2412.06464), in place.

        Request r's states are row `rows[r]`. Queries, keys and values are convolved with `convolution_Xk`,
        the newest token's weight last, go through SiLU, and queries and keys are normed (epsilon
        1e-6). A head's state decays by `exp(-exp(log_rate) * softplus(a + step_bias))`, with both
        float32, and `sigmoid(b)` of what it differs by from the value is added for the key. `out_RV`,
        V = H * value_dim, is what it then holds for the query over sqrt(key_dim). All is float32 but
        what is given, kept of the convolution and returned.
        """
        qkv_RX, convolution_Xk, conv_states, states = step.qkv_RX, step.convolution_Xk, step.conv_states, step.states
        num_states, value_heads, key_dim, value_dim = states.shape
        channels, kernel = convolution_Xk.shape
        key_heads = (channels - value_heads * value_dim) // (2 * key_dim)
        assert 2 * key_heads * key_dim + value_heads * value_dim == channels, (convolution_Xk.shape, states.shape)
        assert value_heads % key_heads == 0, (key_heads, value_heads)
        assert conv_states.shape == (num_states, kernel - 1, channels), conv_states.shape
        assert qkv_RX.shape == (len(rows), channels), (qkv_RX.shape, len(rows))
        assert out_RV.shape == (len(rows), value_heads * value_dim), (out_RV.shape, len(rows))
        checked(rows)
        module().gated_delta_step(
            path=self.path,
            dtype=DTYPES[qkv_RX.dtype],
            key_heads=key_heads,
            value_heads=value_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            channels=channels,
            conv_tokens=kernel - 1,
            qkv=qkv_RX.data_ptr(),
            qkv_stride=qkv_RX.stride(0),
            convolution=convolution_Xk.data_ptr(),
            conv_states=conv_states.data_ptr(),
            conv_state_stride=conv_states.stride(0),
            states=states.data_ptr(),
            state_stride=states.stride(0),
            num_states=num_states,
            a=step.a_RH.data_ptr(),
            a_stride=step.a_RH.stride(0),
            b=step.b_RH.data_ptr(),
            b_stride=step.b_RH.stride(0),
            log_rate=step.log_rate_H.data_ptr(),
            step_bias=step.step_bias_H.data_ptr(),
            rows=rows,
            out=out_RV.data_ptr(),
            out_stride=out_RV.stride(0),
            threads=torch.get_num_threads(),
        )


def _coding(cache: Tensor, parts: Sequence[int]) -> dict[str, Any]:
    """How a cache's rows are coded, whose parts have so many codes."""
    if cache.dtype not in CODES:
        return {"codes": "", "row_bytes": 0, "scales": 0}
    assert cache.shape[1] >= scales_at(parts) + 2 * len(parts), (cache.shape, parts)
    return {"codes": CODES[cache.dtype], "row_bytes": cache.shape[1], "scales": scales_at(parts)}


def _is_float_vector(vector: Tensor) -> bool:
    """Whether it is of float32, one after the other in the host's memory."""
    return vector.is_cpu and vector.dtype is torch.float32 and vector.is_contiguous()
