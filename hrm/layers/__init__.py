"""Layers: what a model is made of.

A layer is a mixer, in which tokens see one another, and the feed-forward blocks after it. `base`
says what a block knows; each kind of block has a file.
"""

from hrm.layers.base import (
    LARGEST_MODEL,
    LARGEST_SIZE,
    Block,
    FeedForward,
    Mixer,
    TensorSpec,
    Unit,
    Vectors,
    check_size,
    places,
)
from hrm.layers.choices import Choices
from hrm.layers.compressed import CompressedAttention
from hrm.layers.division import Stretch, TensorShare, layer_shares, tensor_share
from hrm.layers.feed_forward import DenseFfn, ExpertDivision, RoutedExperts
from hrm.layers.gated_delta import GatedDeltaNet
from hrm.layers.grouped_query import GroupedQueryAttention
from hrm.layers.indexer import Indexer
from hrm.layers.kimi_delta import KimiDelta
from hrm.layers.latent import LatentAttention
from hrm.layers.layer import Layer
from hrm.layers.mamba import Mamba, Mamba2
from hrm.layers.recurrent import RecurrentMixer
from hrm.layers.softmax import SoftmaxAttention
from hrm.layers.work import Kernel, Operator, gemms, linear

__all__ = [
    "LARGEST_MODEL",
    "LARGEST_SIZE",
    "Block",
    "Choices",
    "CompressedAttention",
    "DenseFfn",
    "ExpertDivision",
    "FeedForward",
    "GatedDeltaNet",
    "GroupedQueryAttention",
    "Indexer",
    "Kernel",
    "KimiDelta",
    "LatentAttention",
    "Layer",
    "Mamba",
    "Mamba2",
    "Mixer",
    "Operator",
    "RecurrentMixer",
    "RoutedExperts",
    "SoftmaxAttention",
    "Stretch",
    "TensorShare",
    "TensorSpec",
    "Unit",
    "Vectors",
    "check_size",
    "gemms",
    "layer_shares",
    "linear",
    "places",
    "tensor_share",
]
