"""The maths of a model: functions on tensors of any device, ignorant of any schedule.

An `Architecture` has the maths of each layer: its mixer (`project`, attention by `prefill` or
`append` and `decode`, `finish`), and its `ffn` (`whole`, or `before_experts`, `run_experts` of the
level's kernels, and `finish` where the sum of all experts is complete). `logits` ends the model.
Weights come as views made by `layout`, temporaries from a `Workspace`.
"""

from executor.model.architecture import Architecture, LayerMaths
from executor.model.attention import decode_attention, prefill_attention
from executor.model.experts import run_experts
from executor.model.feed_forward import FeedForward
from executor.model.gpu import GpuKernels
from executor.model.head import embed, logits
from executor.model.kernels import AbstractKernels, CpuKernels
from executor.model.layout import (
    AttentionWeights,
    DenseWeights,
    Experts,
    ExpertStack,
    FfnWeights,
    HeadWeights,
    LatentWeights,
    RouterWeights,
    dense_tensors,
    dense_views,
    expert_tensors,
    expert_views,
    experts_in,
    head_views,
)
from executor.model.mixers import GatedDelta, GroupedQuery, Latent, Mixer, Temperature
from executor.model.norm import Norm, NormKind, normed
from executor.model.numbers import PromptNumbers, Reach, RowNumbers
from executor.model.rotary import Rotary
from executor.model.workspace import Workspace
from executor.native.experts import Activation, ExpertWeights, Glu, Router, Routing, Scores

__all__ = [
    "AbstractKernels",
    "Activation",
    "Architecture",
    "AttentionWeights",
    "CpuKernels",
    "DenseWeights",
    "ExpertStack",
    "ExpertWeights",
    "Experts",
    "FeedForward",
    "FfnWeights",
    "GatedDelta",
    "Glu",
    "GpuKernels",
    "GroupedQuery",
    "HeadWeights",
    "Latent",
    "LatentWeights",
    "LayerMaths",
    "Mixer",
    "Norm",
    "NormKind",
    "PromptNumbers",
    "Reach",
    "Rotary",
    "Router",
    "RouterWeights",
    "Routing",
    "RowNumbers",
    "Scores",
    "Temperature",
    "Workspace",
    "decode_attention",
    "dense_tensors",
    "dense_views",
    "embed",
    "expert_tensors",
    "expert_views",
    "experts_in",
    "head_views",
    "logits",
    "normed",
    "prefill_attention",
    "run_experts",
]
