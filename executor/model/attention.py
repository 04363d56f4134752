"""Attention over the KV cache, and what comes before it.

T tokens, D hidden, H heads, G kv heads, d head_dim, Q = H*d, KV = G*d, X = Q+2KV, R requests,
C tokens of a cache. Queries, keys and values of a token lie in one row of X elements; one token of
a cache holds its keys and then its values, (2, G, d).
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from executor.model.architecture import Architecture
from executor.model.layout import DenseWeights
from executor.model.linear import project
from executor.model.norm import normed
from executor.model.workspace import Workspace
from executor.native import kernels


def pre_attention(
    arch: Architecture, x_TD: Tensor, dense: DenseWeights, positions_T: Tensor,
    qkv_out_TX: Tensor, workspace: Workspace,
) -> None:  # fmt: skip
    """Write queries, keys and values of the normed `x_TD`, rotated to their positions.

    `positions_T` are integers from 0, on the device of the other tensors.
    """
    mark = workspace.mark()
    project(normed(arch, x_TD, dense.attention_norm, workspace), dense.qkv, qkv_out_TX)
    workspace.release(mark)
    if arch.clip_qkv is not None:
        qkv_out_TX.clamp_(-arch.clip_qkv, arch.clip_qkv)
    _rotate(arch, qkv_out_TX, positions_T, workspace)


def prefill_attention(
    arch: Architecture, qkv_TX: Tensor, lengths: Sequence[int], out_TQ: Tensor,
    workspace: Workspace,  # noqa: ARG001 - torch allocates one prompt's output itself
) -> None:  # fmt: skip
    """Causal attention within each of the prompts that lie one after the other in `qkv_TX`."""
    spec = arch.spec
    heads, kv_heads = spec.num_heads, spec.num_kv_heads
    sizes = (heads, kv_heads, kv_heads)
    out_THd = out_TQ.view(-1, heads, spec.head_dim)
    qkv_1XTd = qkv_TX.view(len(qkv_TX), -1, spec.head_dim).transpose(0, 1).unsqueeze(0)
    start = 0
    for length in lengths:
        prompt = slice(start, start + length)
        q, k, v = qkv_1XTd[:, :, prompt].split(sizes, dim=1)
        context = scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=heads != kv_heads
        )
        out_THd[prompt].copy_(context[0].transpose(0, 1))
        start += length
    assert start == len(qkv_TX), (start, qkv_TX.shape)


def append_kv(cache_C2Gd: Tensor, qkv_TX: Tensor, rows_T: Tensor) -> None:
    """Write the tokens' keys and values at the cache's `rows_T` (int64, on the cache's device)."""
    cache = cache_C2Gd.view(len(cache_C2Gd), -1)
    cache.index_copy_(0, rows_T, qkv_TX[:, -cache.shape[1] :])


def decode_attention(
    arch: Architecture, qkv_RX: Tensor, cache_C2Gd: Tensor, starts: Sequence[int],
    lengths: Sequence[int], out_RQ: Tensor,
) -> None:  # fmt: skip
    """Attention of one new token per request over its own part of the cache, in place.

    Request r's tokens are the cache's rows from `starts[r]`, `lengths[r]` of them, the new token
    included. The query heads that share a KV head are the rows of one small attention, so the cache
    is read once; requests are computed one by one, so no result depends on a neighbour. On the CPU
    the native kernel does it if there is one, else torch.
    """
    native = kernels()
    if native is not None and native.takes_attention(qkv_RX, cache_C2Gd, out_RQ):
        native.decode_attention(qkv_RX, cache_C2Gd, starts, lengths, out_RQ)
        return
    kv_heads, head_dim = cache_C2Gd.shape[2:]
    grouped = (len(qkv_RX), 1, kv_heads, arch.spec.num_heads // kv_heads, head_dim)
    queries = qkv_RX[:, : arch.spec.query_size].view(grouped).unbind()
    outputs = out_RQ.view(grouped).unbind()
    keys_1GCd, values_1GCd = cache_C2Gd.permute(1, 2, 0, 3).unsqueeze(1).unbind()
    for query, out, start, length in zip(queries, outputs, starts, lengths, strict=True):
        k, v = keys_1GCd.narrow(2, start, length), values_1GCd.narrow(2, start, length)
        out.copy_(scaled_dot_product_attention(query, k, v))


def _rotate(arch: Architecture, qkv_TX: Tensor, positions_T: Tensor, workspace: Workspace) -> None:
    """Rotary embedding of queries and keys in place: element i turns with element i + d/2."""
    spec = arch.spec
    tokens, half = len(qkv_TX), spec.head_dim // 2
    rotated = spec.num_heads + spec.num_kv_heads
    mark = workspace.mark()
    angles_T1h = workspace.take((tokens, 1, half), torch.float32)
    cos_T1h = workspace.take((tokens, 1, half), torch.float32)
    frequencies_h = inverse_frequencies(spec.head_dim, arch.rope_theta, qkv_TX.device)
    torch.mul(positions_T.view(-1, 1, 1), frequencies_h, out=angles_T1h)
    torch.cos(angles_T1h, out=cos_T1h)
    sin_T1h = angles_T1h.sin_()
    if qkv_TX.dtype is not torch.float32:
        cos_T1h = workspace.take(cos_T1h.shape, qkv_TX.dtype).copy_(cos_T1h)
        sin_T1h = workspace.take(sin_T1h.shape, qkv_TX.dtype).copy_(sin_T1h)
    qk = qkv_TX[:, : rotated * 2 * half].view(tokens, rotated, 2 * half)
    first, second = qk[..., :half], qk[..., half:]
    first_sin = workspace.take((tokens, rotated, half), qkv_TX.dtype)
    torch.mul(first, sin_T1h, out=first_sin)
    first.mul_(cos_T1h).addcmul_(second, sin_T1h, value=-1)
    second.mul_(cos_T1h).add_(first_sin)
    workspace.release(mark)


@lru_cache(maxsize=8)
def inverse_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Radians per position of the head_dim/2 rotations, float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return (1.0 / theta**exponents).to(device)
