"""Rotations by the keys of published configs, against the functions of transformers."""

from typing import Any

import pytest
import torch

from executor.families.rope import Rope
from executor.model import Rotary
from hrm.errors import ModelError
from hrm.model_spec import Keys

HEAD_DIM = 32
SIZES = {"num_attention_heads": 4, "hidden_size": 128, "max_position_embeddings": 131_072}
YARN = {"rope_type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
FACTORS = [1.0 + 0.25 * i for i in range(HEAD_DIM // 2)]
PUBLISHED = {
    "none": {"rope_theta": 1e6},
    "partial": {"rope_theta": 5e6, "partial_rotary_factor": 0.5},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "llama4-scout": {
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "llama3, smoothly": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    },
    "deepseek-v3": {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "deepseek-v2-lite": {"rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.3}},
    "qwen3, long": {
        "rope_theta": 1e6,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768},
    },
    "gpt-oss": {"rope_theta": 15e4, "rope_parameters": {**YARN, "factor": 32.0, "truncate": False, "rope_theta": 15e4}},
    "gemma-4": {"rope_theta": 1e6, "rope_scaling": {"rope_type": "proportional", "partial_rotary_factor": 0.25}},
    "proportional, scaled": {
        "rope_scaling": {"rope_type": "proportional", "partial_rotary_factor": 0.6, "factor": 4.0}
    },
    "yarn with its magnitude": {"rope_scaling": {**YARN, "attention_factor": 1.25}},
    "longrope": {
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "longrope", "short_factor": FACTORS, "long_factor": [9 * x for x in FACTORS]},
    },
}


def rope(config: dict[str, Any], partial: float | None = 1.0) -> Rope:
    return Rope.read(Keys({**SIZES, **config}, "config.json"), theta=10_000.0, positions=2048, partial=partial)


def assert_as_transformers(name: str, ours: Rotary, **length: int) -> None:
    from transformers import Qwen3MoeConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding

    theirs: Any = Qwen3MoeConfig(**{**SIZES, "head_dim": HEAD_DIM, **PUBLISHED[name]})
    kind = theirs.rope_parameters["rope_type"]
    function = ROPE_INIT_FUNCTIONS.get(kind, Glm4MoeRotaryEmbedding.compute_default_rope_parameters)
    frequencies, magnitude = function(theirs, torch.device("cpu"), **length)
    torch.testing.assert_close(torch.tensor(ours.frequencies), frequencies, rtol=1e-6, atol=0)
    assert ours.magnitude == pytest.approx(magnitude)


@pytest.mark.parametrize("name", PUBLISHED)
def test_frequencies_and_magnitude_are_those_of_transformers(name):
    assert_as_transformers(name, rope(PUBLISHED[name]).rotary(HEAD_DIM))


def test_long_texts_have_rotations_of_their_own():
    longer = rope(PUBLISHED["longrope"]).of_long_texts
    assert longer is not None
    assert longer.max_positions == SIZES["max_position_embeddings"]
    assert_as_transformers("longrope", longer.rotary(HEAD_DIM), seq_len=4097)
    assert all(rope(config).of_long_texts is None for name, config in PUBLISHED.items() if name != "longrope")


def test_the_part_that_turns_may_be_told_in_elements():
    assert len(rope({"rotary_dim": 24}).rotary(HEAD_DIM).frequencies) == 12


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_what_depends_on_the_length_is_run_where_it_does_not(name):
    """Up to that length, transformers' numbers are the same for every length."""
    assert rope(PUBLISHED[name]).max_positions == {"dynamic": 131_072, "longrope": 4096}[name]
    assert rope(PUBLISHED["deepseek-v3"]).max_positions == 131_072


def test_phi_tells_the_magnitudes():
    scaling = {**PUBLISHED["longrope"]["rope_scaling"], "short_mscale": 1.25, "long_mscale": 1.5}
    short = rope({**PUBLISHED["longrope"], "rope_scaling": scaling})
    assert short.of_long_texts is not None
    assert [each.rotary(HEAD_DIM).magnitude for each in (short, short.of_long_texts)] == [1.25, 1.5]


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"rope_scaling": {"type": "axial"}}, "rope_scaling: type"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "rope_scaling: short_factor"),
        ({"rope_theta": 1.0, "rope_scaling": YARN}, "rope_theta"),
        ({"partial_rotary_factor": 0.01}, "partial_rotary_factor"),
        ({"rotary_dim": HEAD_DIM + 2}, "rotary_dim"),
        ({"rope_scaling": {"rope_theta": 2.0}, "rope_theta": 3.0}, "rope_scaling: rope_theta"),
    ],
)
def test_what_cannot_be_run_is_refused_by_its_key(config, part):
    with pytest.raises(ModelError) as caught:
        rope(config).rotary(HEAD_DIM)
    assert f"config.json: {part}" in str(caught.value)


def test_families_that_rotate_whole_heads_refuse_less():
    with pytest.raises(ModelError, match="partial_rotary_factor"):
        rope(PUBLISHED["partial"], partial=None)
