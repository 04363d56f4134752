"""Choosing experts one after the other, against transformers' router of Phi-3.5-MoE."""

import pytest
import torch
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from executor.model.feed_forward import sparse_mixer


@pytest.mark.parametrize("jitter", [0.01, 0.2, 0.7])
@pytest.mark.parametrize("mean", [-2.0, 0.0, 2.0])  # below nought the best has the least absolute value
def test_choices_and_weights_are_those_of_transformers(mean, jitter):
    logits_TE = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)) + mean
    logits_TE[0] = 0.0  # all alike
    weights_TK, experts_TK = sparsemixer(logits_TE, jitter, training=False)
    ours = sparse_mixer(logits_TE.clone(), 2, jitter)
    assert torch.equal(ours.experts_TK, experts_TK)
    torch.testing.assert_close(ours.weights_TK, weights_TK)
    assert (ours.weights_TK < 1).any()
