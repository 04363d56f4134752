"""The maths of a model: pure functions on tensors of any device, ignorant of any schedule.

A layer is `pre_attention`, then `prefill_attention` or `append_kv` and `decode_attention`, then
`post_attention` and `run_experts`, or `feed_forward` if it has no experts; `logits` ends the model.
Weights come as views made by `layout`, temporaries from a `Workspace`.
"""

from executor.model.architecture import Architecture, Norm, Router, Scores
from executor.model.attention import append_kv, decode_attention, pre_attention, prefill_attention, to_cache
from executor.model.experts import Routing, logits, post_attention, run_experts
from executor.model.feed_forward import feed_forward
from executor.model.gpu import GpuKernels
from executor.model.kernels import AbstractKernels, CpuKernels
from executor.model.layout import (
    AttentionWeights,
    DenseWeights,
    Experts,
    ExpertStack,
    ExpertWeights,
    FfnWeights,
    HeadWeights,
    RouterWeights,
    dense_tensors,
    dense_views,
    embedding_tensors,
    expert_tensors,
    expert_views,
    experts_in,
    head_tensors,
    head_views,
)
from executor.model.numbers import PromptNumbers, RowNumbers
from executor.model.workspace import Workspace

__all__ = [
    "AbstractKernels",
    "Architecture",
    "AttentionWeights",
    "CpuKernels",
    "DenseWeights",
    "ExpertStack",
    "ExpertWeights",
    "Experts",
    "FfnWeights",
    "GpuKernels",
    "HeadWeights",
    "Norm",
    "PromptNumbers",
    "Router",
    "RouterWeights",
    "Routing",
    "RowNumbers",
    "Scores",
    "Workspace",
    "append_kv",
    "decode_attention",
    "dense_tensors",
    "dense_views",
    "embedding_tensors",
    "expert_tensors",
    "expert_views",
    "experts_in",
    "feed_forward",
    "head_tensors",
    "head_views",
    "logits",
    "post_attention",
    "pre_attention",
    "prefill_attention",
    "run_experts",
    "to_cache",
]
