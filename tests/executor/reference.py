"""The whole model slowly and obviously right, in float32: what the fast maths is tested against.

T tokens, D hidden, H heads, G kv heads, d head_dim, E experts, K experts per token, V vocab.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from executor.checkpoint import WeightSource
from executor.families import Family
from executor.formats import Matrix
from executor.model import Architecture, FeedForward, GroupedQuery, Norm, NormKind, Rotary, Scores
from executor.model.layout import (
    AttentionWeights,
    DenseWeights,
    ExpertWeights,
    FfnWeights,
    HeadWeights,
    Tensors,
    dense_tensors,
    dense_views,
    expert_tensors,
    expert_views,
    head_views,
    num_elements,
)


@dataclass(frozen=True, slots=True)
class ReferenceModel:
    """A model with all its weights in memory."""

    arch: Architecture
    embedding: Tensor  # (V, D)
    layers: list[tuple[DenseWeights, list[ExpertWeights]]]
    head: HeadWeights


def load(family: Family, source: WeightSource, arch: Architecture) -> ReferenceModel:
    """Read all weights as float32."""
    spec = arch.spec

    def load(tensors: Tensors, *place: int) -> Tensor:
        flat = torch.empty(num_elements(tensors, torch.float32))
        family.load(source, spec, tensors, flat, *place)
        return flat

    layers: list[tuple[DenseWeights, list[ExpertWeights]]] = []
    for index, layer in enumerate(spec.layers):
        experts = [expert_views(layer, load(expert_tensors(layer), index, e)) for e in range(layer.num_experts)]
        layers.append((dense_views(layer, load(dense_tensors(layer), index)), experts))
    embedding_VD = load(spec.embedding_tensors)[: spec.embedding_parameters].view(spec.vocab_size, -1)
    return ReferenceModel(arch, embedding_VD, layers, head_views(spec, load(spec.head_tensors)))


def forward(model: ReferenceModel, tokens: list[int]) -> Tensor:
    """Logits (T, V) of the token after each of one prompt's tokens."""
    hidden_TD, positions_T = model.embedding[tokens], torch.arange(len(tokens))
    for (dense, experts), maths in zip(model.layers, model.arch.layers, strict=True):
        mixer, ffn_maths = maths.mixer, maths.ffn
        assert isinstance(mixer, GroupedQuery)
        x_TD = norm(mixer.norm, hidden_TD, dense.mixer.attention_norm)
        q, k, v = queries_keys_values(mixer, x_TD, dense.mixer, positions_T)
        hidden_TD = hidden_TD + attention(q, k, v) @ dequantised(dense.mixer.output).T
        x_TD = norm(ffn_maths.norm, hidden_TD, dense.ffn.ffn_norm)
        if isinstance(dense.ffn, FfnWeights):
            hidden_TD = hidden_TD + ffn(x_TD, dense.ffn.dense_w13, dense.ffn.dense_w2)
            continue
        weights_TK, experts_TK = route(ffn_maths, x_TD, dense.ffn.router)
        hidden_TD = hidden_TD + moe(x_TD, weights_TK, experts_TK, enumerate(experts))
    return norm(model.arch.final_norm, hidden_TD, model.head.final_norm) @ model.head.lm_head.T


def greedy(model: ReferenceModel, prompt: list[int], max_tokens: int) -> list[int]:
    """The most probable continuation, up to and including an end-of-sequence token."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(int(forward(model, tokens)[-1].argmax()))
        if tokens[-1] in model.arch.eos_token_ids:
            break
    return tokens[len(prompt) :]


def norm(norm: Norm, x_TD: Tensor, weight_D: Tensor) -> Tensor:
    """Each row divided by its root mean square, for LAYER after subtracting its mean."""
    if norm.kind is NormKind.LAYER:
        x_TD = x_TD - x_TD.mean(-1, keepdim=True)
    return x_TD / (x_TD.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * weight_D


def queries_keys_values(
    mixer: GroupedQuery, x_TD: Tensor, weights: AttentionWeights, positions_T: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries (T, H, d), rotated keys (T, G, d) and values (T, G, d)."""
    block, rotary = mixer.block, mixer.rotary
    assert rotary is not None
    qkv = x_TD @ dequantised(weights.qkv).T
    if mixer.clip is not None:
        qkv = qkv.clamp(-mixer.clip, mixer.clip)
    sizes = [block.num_heads, block.num_kv_heads, block.num_kv_heads]
    q, k, v = qkv.view(len(x_TD), -1, block.head_dim).split(sizes, dim=1)
    return rotate(rotary, q, positions_T), rotate(rotary, k, positions_T), v


def rotate(rotary: Rotary, x_THd: Tensor, positions_T: Tensor) -> Tensor:
    """The pairs of the first 2h elements, i and i + h or neighbours, turned by the position's angles."""
    half = len(rotary.frequencies)
    turned_THd, rest_THd = x_THd[..., : 2 * half], x_THd[..., 2 * half :]
    pairs_THh2 = turned_THd.unflatten(-1, (half, 2)) if rotary.interleaved else torch.stack(turned_THd.chunk(2, -1), -1)
    angles = positions_T[:, None] * torch.tensor(rotary.frequencies)
    turns = torch.polar(torch.full_like(angles, rotary.magnitude), angles)[:, None]
    out = torch.view_as_real(torch.view_as_complex(pairs_THh2.contiguous()) * turns)
    out = out.flatten(-2) if rotary.interleaved else torch.cat([out[..., 0], out[..., 1]], dim=-1)
    return torch.cat([out, rest_THd], dim=-1)


def attention(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
    """Causal attention of the last len(q) of len(k) tokens, (T, H*d)."""
    group = q_THd.shape[1] // k_TGd.shape[1]
    k, v = k_TGd.repeat_interleave(group, dim=1), v_TGd.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q_THd, k) / q_THd.shape[-1] ** 0.5
    ahead = torch.ones(len(q_THd), len(k), dtype=torch.bool).triu(len(k) - len(q_THd) + 1)
    weights = scores.masked_fill(ahead, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


def route(ffn: FeedForward, x_TD: Tensor, router_ED: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and indices (T, K) of the experts that each token goes to."""
    logits = x_TD @ router_ED.T
    scores = 1 / (1 + (-logits).exp()) if ffn.router.scores is Scores.SIGMOID else logits.softmax(-1)
    weights, experts = scores.sort(dim=-1, descending=True)
    chosen = ffn.experts_per_token
    weights, experts = weights[:, :chosen], experts[:, :chosen]
    if ffn.router.norm is not None:
        order = ffn.router.norm
        weights = weights / weights.pow(order).sum(-1, keepdim=True).pow(1 / order)
    return weights, experts


def moe(x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, experts: Iterable[tuple[int, ExpertWeights]]) -> Tensor:
    """Every expert over every token, weighted by nought where the token does not go to it."""
    out_TD = torch.zeros_like(x_TD)
    for index, expert in experts:
        weight_T = torch.where(experts_TK == index, weights_TK, 0).sum(-1)
        out_TD += weight_T[:, None] * ffn(x_TD, expert.w13, expert.w2)
    return out_TD


def ffn(x_TD: Tensor, w13: Matrix, w2: Matrix) -> Tensor:
    """The gated SiLU of one half of `w13 @ x` times the other half, projected back."""
    gate, up = (x_TD @ dequantised(w13).T).chunk(2, dim=-1)
    return (gate * gate.sigmoid() * up) @ dequantised(w2).T


def dequantised(matrix: Matrix) -> Tensor:
    """A matrix of numbers, whatever it is stored as."""
    return matrix if isinstance(matrix, Tensor) else matrix.dequantised(torch.empty(matrix.shape))
