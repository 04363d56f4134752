"""What a config asks for that a family lacks is refused, naming the key."""

import pytest

from executor.families import family_for
from executor.model import GroupedQuery, Temperature
from hrm.errors import ModelError
from tests.executor.families.tiny import SIZES
from tests.executor.families.windowed import GEMMA4

GLM = {"moe_intermediate_size": 24, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1}
CONFIGS = {
    "glm4_moe": {**GLM, "n_group": 1, "topk_group": 1},
    "minimax_m2": {"num_local_experts": 8},
    "gemma4_text": GEMMA4,
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_intermediate_size": 24},
    "phimoe": {"num_local_experts": 8},
    "llama4_text": {"num_local_experts": 8, "attention_chunk_size": 16},
}


@pytest.mark.parametrize(
    ("family", "changes", "key"),
    [
        ("glm4_moe", {"n_group": 3}, "n_group"),
        ("glm4_moe", {"n_group": 8}, "n_group"),
        ("glm4_moe", {"n_group": 4, "topk_group": 5}, "topk_group"),
        ("glm4_moe", {"n_group": 4, "num_experts_per_tok": 3}, "topk_group"),
        ("glm4_moe", {"hidden_act": "gelu"}, "hidden_act"),
        ("minimax_m2", {"scoring_func": "softmax"}, "scoring_func"),
        ("minimax_m2", {"qk_norm_type": "per_head"}, "qk_norm_type"),
        ("minimax_m2", {"use_qk_norm": False}, "use_qk_norm"),
        ("minimax_m2", {"shared_intermediate_size": 64}, "shared_intermediate_size"),
        ("minimax_m2", {"attn_type_list": [1, 0, 1]}, "attn_type_list"),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ("gemma4_text", {"hidden_activation": "silu"}, "hidden_activation"),
        ("gemma4_text", {"sliding_window": 256}, "sliding_window"),
        ("gemma4_text", {"rope_parameters": {"full_attention": {}}}, "rope_parameters: sliding_attention"),
        ("gemma4_text", {"final_logit_softcapping": -1}, "final_logit_softcapping"),
        ("ernie4_5_moe", {"use_bias": True}, "use_bias"),
        ("ernie4_5_moe", {"moe_norm_min": 0.5}, "moe_norm_min"),
        ("phimoe", {"num_experts_per_tok": 3}, "num_experts_per_tok"),
        ("phimoe", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ("llama4_text", {"layer_types": ["sliding_attention"] * 3, "sliding_window": 8}, "layer_types"),
        ("llama4_text", {"attn_temperature_tuning": "yes"}, "attn_temperature_tuning"),
    ],
)
def test_what_a_family_lacks_is_refused_by_its_key(family, changes, key):
    config = {**SIZES, "model_type": family, "num_experts_per_tok": 2, **CONFIGS[family]}
    family_for(config, "config.json").architecture(config, "config.json")
    config |= changes
    with pytest.raises(ModelError) as caught:
        family_for(config, "config.json").architecture(config, "config.json")
    assert str(caught.value).startswith(f"config.json: {key} ")


@pytest.mark.parametrize(("told", "scaled"), [(4, True), (True, True), (0, False), (False, False), (None, True)])
def test_the_first_configs_of_llama4_have_a_number_for_whether_queries_are_scaled(told, scaled):
    config = {**SIZES, **CONFIGS["llama4_text"], "model_type": "llama4_text", "num_experts_per_tok": 1}
    config |= {"no_rope_layers": [1, 0], "attn_temperature_tuning": told, "floor_scale": 4, "attn_scale": 0.5}
    layers = family_for(config, "config.json").architecture(config, "config.json").layers
    whole = Temperature(stretch=4, scale=0.5) if scaled else None
    found = [layer.mixer.temperature for layer in layers if isinstance(layer.mixer, GroupedQuery)]
    assert found == [None, whole]
