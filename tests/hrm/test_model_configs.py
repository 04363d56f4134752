"""Readers of config.json: as published, as transformers understands it, and what is refused."""

import json

import pytest
import torch

from hrm.errors import ModelError
from hrm.model_spec import BUILT_IN_MODELS, Keys, load_model, spec_from_hf_config
from hrm.model_spec.families import FAMILY_READERS
from tests.hrm.published_configs import PUBLISHED, changed, decoder_keys, without

MIXTRAL, DBRX = PUBLISHED["mixtral-8x7b"], PUBLISHED["dbrx"]


# Text parts to which transformers gives a head in the whole model only.
HEADLESS = {"qwen3_vl_moe_text": "Qwen3VLMoeTextModel", "step3p5": "Step3p7TextModel"}


def read(config, where="x"):
    return spec_from_hf_config(config, where)


def transformers_config(config):
    """The same as transformers' own configuration, which knows Kimi K2 as a DeepSeek-V3."""
    from transformers import AutoConfig

    keys = {**decoder_keys(config)}
    keys.pop("quantization_config", None)
    model_type = keys.pop("model_type")
    return AutoConfig.for_model("deepseek_v3" if model_type == "kimi_k2" else model_type, **keys)


def stored_elements(config):
    """Elements of all that a checkpoint of this configuration stores; ties count once."""
    import transformers

    headless = HEADLESS.get(config.model_type)
    with torch.device("meta"):
        if headless is None:
            model = transformers.AutoModelForCausalLM.from_config(config)
        else:
            model = getattr(transformers, headless)(config)
    tensors = model.state_dict(keep_vars=True).values()
    head = config.vocab_size * config.hidden_size if headless and not config.tie_word_embeddings else 0
    return head + sum({id(tensor): tensor.numel() for tensor in tensors}.values())


def test_every_family_has_a_published_model():
    assert set(PUBLISHED) == set(BUILT_IN_MODELS)
    tried = {BUILT_IN_MODELS[name].family for name in NEEDED} | {model_type for model_type, *_ in VARIANTS}
    assert tried | {"bailing_moe", "bailing_moe_v2", "step3p7"} == set(FAMILY_READERS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_reads_as_the_built_in_model(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PUBLISHED[name]))
    spec = load_model(str(folder))
    assert spec == load_model(str(folder / "config.json")) == BUILT_IN_MODELS[name]
    assert spec.published_dtype == BUILT_IN_MODELS[name].published_dtype


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_builds_the_same_model(name):
    config = transformers_config(PUBLISHED[name])
    assert stored_elements(config) == BUILT_IN_MODELS[name].parameters
    plain = {**config.to_dict(), "model_type": decoder_keys(PUBLISHED[name])["model_type"]}
    assert read(plain, f"{name}/config.json") == BUILT_IN_MODELS[name]


# Small models of every family, changed in what decides how many parameters there are.
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "vocab_size": 40,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
SMALL_GQA = {**SMALL, "num_key_value_heads": 2}
SMALL_DEEPSEEK = {
    **SMALL,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 20,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 12,
    "q_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_group": 1,
    "topk_group": 1,
}
SMALL_QWEN = {**SMALL_GQA, "moe_intermediate_size": 20, "num_experts": 4}
SMALL_QWEN2 = {**SMALL_QWEN, "shared_expert_intermediate_size": 28}
SMALL_NEXT = {
    **SMALL_QWEN2,
    "head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 3,
}
SMALL_LLAMA4 = {**SMALL_GQA, "num_local_experts": 4, "intermediate_size_mlp": 48, "attention_chunk_size": 8}
SMALL_GLM = {
    **SMALL_GQA,
    "moe_intermediate_size": 20,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "first_k_dense_replace": 2,
}
SMALL_LOCAL = {**SMALL_GQA, "num_local_experts": 4}
SMALL_GEMMA4 = {
    **{key: value for key, value in SMALL_GQA.items() if key != "num_experts_per_tok"},
    "enable_moe_block": True,
    "top_k_experts": 2,
    "num_experts": 4,
    "moe_intermediate_size": 20,
    "hidden_size_per_layer_input": 0,
    "head_dim": 12,
    "global_head_dim": 16,
    "sliding_window": 8,
}
SMALL_ERNIE = {
    **{key: value for key, value in SMALL_GQA.items() if key != "num_experts_per_tok"},
    "moe_k": 2,
    "moe_num_experts": 4,
    "moe_intermediate_size": 20,
    "moe_num_shared_experts": 2,
}
SMALL_SPARSE = {**SMALL_DEEPSEEK, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4}
SMALL_V4 = {
    **{key: value for key, value in SMALL.items() if key != "intermediate_size"},
    "head_dim": 16,
    "num_hidden_layers": 5,
    "num_key_value_heads": 1,
    "moe_intermediate_size": 20,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "q_lora_rank": 10,
    "o_groups": 2,
    "o_lora_rank": 6,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 4,
    "sliding_window": 8,
    "compress_ratios": [0, 4, 128, 4, 128, 0],
    "num_hash_layers": 2,
    "hc_mult": 3,
    "pad_token_id": 0,
}
SMALL_LONGCAT = {
    **{key: value for key, value in SMALL_DEEPSEEK.items() if key not in {"num_hidden_layers", "intermediate_size"}},
    "num_layers": 2,
    "ffn_hidden_size": 24,
    "expert_ffn_hidden_size": 20,
    "zero_expert_num": 0,  # of more transformers keeps matrices that it never uses
}
SMALL_NEMOTRON = {
    **{key: value for key, value in SMALL_GQA.items() if key != "num_hidden_layers"},
    "hybrid_override_pattern": "MEM*-EE",
    "head_dim": 12,
    "mamba_num_heads": 6,
    "mamba_head_dim": 8,
    "ssm_state_size": 10,
    "n_groups": 2,
    "conv_kernel": 3,
    "n_routed_experts": 4,
    "moe_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 28,
}
SMALL_JAMBA = {**SMALL_GQA, "num_experts": 4, "attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 6}
KIMI_NAMES = {
    "n_routed_experts": "num_experts",
    "n_shared_experts": "num_shared_experts",
    "num_experts_per_tok": "num_experts_per_token",
}
PLAIN_KIMI = {**{KIMI_NAMES.get(key, key): value for key, value in SMALL_DEEPSEEK.items()}, "pad_token_id": 0}
SMALL_KIMI = {
    **PLAIN_KIMI,
    "linear_attn_config": {
        "full_attn_layers": [2, 4],
        "kda_layers": [1, 3],
        "head_dim": 6,
        "num_heads": 3,
        "short_conv_kernel_size": 3,
    },
}
SMALL_BAILING = {**PLAIN_KIMI, "head_dim": 4, "short_conv_kernel_size": 3, "layer_group_size": 2}
SMALL_MIMO = {
    **SMALL_GQA,
    "n_routed_experts": 4,
    "moe_intermediate_size": 20,
    "head_dim": 12,
    "v_head_dim": 8,
    "sliding_window_size": 7,
    "num_key_value_heads": 1,
}
SMALL_HUNYUAN = {
    **{key: value for key, value in SMALL_GQA.items() if key != "num_experts_per_tok"},
    "num_experts": 4,
    "moe_topk": 4 * [2],
    "head_dim": 12,
}
SMALL_STEP = {**SMALL_GQA, "head_dim": 12, "n_routed_experts": 4, "moe_intermediate_size": 20, "share_expert_dim": 28}
VARIANTS = [
    ("mixtral", SMALL_LOCAL, {}),
    ("mixtral", SMALL_LOCAL, {"head_dim": 12, "tie_word_embeddings": True}),
    ("qwen2_moe", SMALL_QWEN2, {}),
    ("qwen2_moe", SMALL_QWEN2, {"qkv_bias": False, "tie_word_embeddings": True, "head_dim": 12}),
    ("qwen3_moe", SMALL_QWEN, {"attention_bias": True, "head_dim": 12}),
    ("qwen3_moe", SMALL_QWEN, {"mlp_only_layers": [0, 1, 9]}),
    ("qwen3_moe", SMALL_QWEN, {"mlp_only_layers": [1], "decoder_sparse_step": 2}),
    ("qwen3_next", SMALL_NEXT, {}),
    ("qwen3_next", SMALL_NEXT, {"attention_bias": True, "mlp_only_layers": [2], "full_attention_interval": 2}),
    ("qwen3_next", SMALL_NEXT, {"layer_types": ["full_attention", *3 * ["linear_attention"]]}),
    ("deepseek_v2", SMALL_DEEPSEEK, {}),
    ("deepseek_v2", SMALL_DEEPSEEK, {"q_lora_rank": None, "attention_bias": True}),
    ("deepseek_v3", SMALL_DEEPSEEK, {"attention_bias": True}),
    ("deepseek_v3", SMALL_DEEPSEEK, {"n_shared_experts": 3, "first_k_dense_replace": 0}),
    ("deepseek_v3", SMALL_DEEPSEEK, {"q_lora_rank": None, "tie_word_embeddings": True}),
    ("gpt_oss", {**SMALL_LOCAL, "sliding_window": 8}, {}),
    ("gpt_oss", {**SMALL_LOCAL, "sliding_window": 8}, {"attention_bias": False, "head_dim": 12}),
    ("llama4_text", SMALL_LLAMA4, {}),
    ("llama4_text", SMALL_LLAMA4, {"attention_bias": True, "moe_layers": [2, 3]}),
    ("llama4_text", SMALL_LLAMA4, {"interleave_moe_layer_step": 2}),
    ("llama4_text", SMALL_LLAMA4, {"moe_layers": [0, 3]}),
    ("glm4_moe", SMALL_GLM, {}),
    ("glm4_moe", SMALL_GLM, {"attention_bias": True, "use_qk_norm": True, "head_dim": 12}),
    ("phimoe", SMALL_LOCAL, {}),
    ("phimoe", SMALL_LOCAL, {"attention_bias": True, "lm_head_bias": True, "head_dim": 12}),
    ("olmoe", {**SMALL_GQA, "num_experts": 4}, {}),
    ("olmoe", {**SMALL_GQA, "num_experts": 4}, {"attention_bias": True}),
    ("qwen3_vl_moe_text", SMALL_QWEN, {"mlp_only_layers": [1]}),
    ("qwen3_5_moe_text", SMALL_NEXT, {"attention_bias": True}),
    ("glm4_moe_lite", SMALL_DEEPSEEK, {}),
    ("glm4_moe_lite", SMALL_DEEPSEEK, {"mlp_layer_types": ["sparse", "dense", "sparse", "sparse"]}),
    ("minimax_m2", {**SMALL_LOCAL, "head_dim": 12}, {}),
    ("gemma4_text", SMALL_GEMMA4, {}),
    ("gemma4_text", SMALL_GEMMA4, {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "attention_bias": True}),
    ("gemma4_text", SMALL_GEMMA4, {"tie_word_embeddings": False, "layer_types": 4 * ["sliding_attention"]}),
    ("granitemoe", SMALL_LOCAL, {}),
    ("granitemoe", SMALL_LOCAL, {"attention_bias": True, "tie_word_embeddings": True}),
    ("deepseek_v32", SMALL_SPARSE, {}),
    ("glm_moe_dsa", SMALL_SPARSE, {"attention_bias": True, "indexer_types": ["full", "shared", "full", "shared"]}),
    ("glm_moe_dsa", SMALL_SPARSE, {"index_topk_freq": 2, "index_skip_topk_offset": 1}),
    ("deepseek_v4", SMALL_V4, {}),
    ("deepseek_v4", SMALL_V4, {"compress_ratios": None, "num_hash_layers": 0}),
    ("longcat_flash", SMALL_LONGCAT, {"attention_bias": True}),
    ("nemotron_h", SMALL_NEMOTRON, {}),
    ("nemotron_h", SMALL_NEMOTRON, {"moe_latent_size": 16, "mlp_bias": True, "use_bias": True, "use_conv_bias": False}),
    ("jamba", SMALL_JAMBA, {}),
    ("jamba", SMALL_JAMBA, {"mamba_proj_bias": True, "mamba_conv_bias": False, "mamba_dt_rank": 5}),
    ("kimi_linear", SMALL_KIMI, {}),
    ("kimi_linear", PLAIN_KIMI, {"q_lora_rank": None, "linear_num_heads": 3}),
    ("bailing_hybrid", SMALL_BAILING, {"q_lora_rank": None}),
    ("dots1", SMALL_GLM, {"attention_bias": True}),
    ("hunyuan_v1_moe", SMALL_HUNYUAN, {"attention_bias": True}),
    ("mimo_v2_flash", SMALL_MIMO, {"attention_bias": True}),
    ("mimo_v2_flash", SMALL_MIMO, {"mlp_layer_types": ["sparse", "dense", "sparse", "sparse"]}),
    ("step3p5", SMALL_STEP, {"layer_types": ["full_attention", *3 * ["sliding_attention"]], "sliding_window": 8}),
    (
        "step3p5",
        SMALL_STEP,
        {
            "layer_types": 4 * ["sliding_attention"],
            "sliding_window": 8,
            "moe_layers_enum": "1,2",
            "attention_other_setting": {"num_attention_heads": 6},
        },
    ),
    ("ernie4_5_moe", SMALL_ERNIE, {}),
    ("ernie4_5_moe", SMALL_ERNIE, {"use_bias": True, "tie_word_embeddings": False, "moe_layer_end_index": 2}),
    ("ernie4_5_moe", SMALL_ERNIE, {"use_bias": True, "moe_num_shared_experts": 0, "moe_layer_interval": 2}),
]


@pytest.mark.parametrize(("model_type", "sizes", "changes"), VARIANTS)
def test_small_models_have_the_parameters_that_transformers_stores(model_type, sizes, changes):
    given = {"model_type": model_type, **sizes, **changes}
    config = transformers_config(given)
    spec = read(given)
    assert spec.parameters == stored_elements(config)
    assert read(config.to_dict()) == spec


WINDOWED = [
    ("mixtral", SMALL_LOCAL, {"sliding_window": 8}),
    ("mixtral", SMALL_LOCAL, {"sliding_window": 64}),
    ("phimoe", SMALL_LOCAL, {"sliding_window": 8}),
    ("qwen3_moe", SMALL_QWEN, {"sliding_window": 8, "use_sliding_window": True}),
    ("qwen3_moe", SMALL_QWEN, {"sliding_window": 8}),
    ("qwen2_moe", SMALL_QWEN2, {"sliding_window": 8, "use_sliding_window": True}),
    ("qwen2_moe", SMALL_QWEN2, {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}),
    ("qwen2_moe", SMALL_QWEN2, {"sliding_window": 8, "use_sliding_window": False}),
    ("gpt_oss", SMALL_LOCAL, {"sliding_window": 8, "head_dim": 8}),
    (
        "gpt_oss",
        SMALL_LOCAL,
        {
            "sliding_window": 8,
            "head_dim": 8,
            "layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"],
        },
    ),
    ("llama4_text", SMALL_LLAMA4, {"head_dim": 8}),
    ("llama4_text", SMALL_LLAMA4, {"head_dim": 8, "no_rope_layers": [0, 1, 1, 0]}),
    ("llama4_text", SMALL_LLAMA4, {"head_dim": 8, "no_rope_layer_interval": 2}),
    ("olmoe", {**SMALL_GQA, "num_experts": 4}, {}),
    ("deepseek_v3", SMALL_DEEPSEEK, {}),
    ("gemma4_text", SMALL_GEMMA4, {}),
    ("mimo_v2_flash", SMALL_MIMO, {}),
]


@pytest.mark.parametrize(("model_type", "sizes", "changes"), WINDOWED)
def test_layers_reach_back_as_far_as_in_transformers(model_type, sizes, changes):
    from transformers import AutoModelForCausalLM

    given = {"model_type": model_type, **sizes, **changes}
    config = transformers_config(given)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.arange(1, 17)[None]  # the last of two chunks of 8
    with torch.inference_mode():
        attentions = model(tokens, output_attentions=True).attentions
    reached = [int((weights[0, 0, -1] > 0).sum()) for weights in attentions]
    spec = read(given)
    assert reached == [layer.mixer.reach(16) for layer in spec.layers]


# -- other spellings of the same --------------------------------------------------------------


def test_aliases_mean_the_same():
    spec = read(MIXTRAL)
    renamed = without("mixtral-8x7b", "num_local_experts", "num_experts_per_tok")
    for experts in ("num_experts", "num_local_experts", "n_routed_experts"):
        for per_token in ("num_experts_per_tok", "experts_per_token", "moe_top_k"):
            assert read({**renamed, experts: 8, per_token: 2}) == spec
    with pytest.raises(ModelError, match="num_experts is 16: must be as num_local_experts, 8"):
        read({**MIXTRAL, "num_experts": 16})


def test_optional_keys_have_the_defaults_of_the_format():
    assert read({**MIXTRAL, "num_key_value_heads": None}).num_kv_heads == 32
    assert read(without("olmoe-1b-7b", "num_key_value_heads")) == read(PUBLISHED["olmoe-1b-7b"])
    assert read({**MIXTRAL, "head_dim": 96}).head_dim == 96
    assert read({**MIXTRAL, "head_dim": None}).head_dim == 128
    assert read(without("mixtral-8x7b", "tie_word_embeddings")) == read(MIXTRAL)
    assert read(without("gpt-oss-20b", "head_dim")) == read(PUBLISHED["gpt-oss-20b"])
    assert read(changed("deepseek-v3", n_shared_experts=0)).experts.shared_intermediate_size == 0
    tied = read({**MIXTRAL, "tie_word_embeddings": True})
    assert BUILT_IN_MODELS["mixtral-8x7b"].parameters - tied.parameters == 32000 * 4096


def test_the_text_part_of_a_multimodal_model_is_read():
    scout = PUBLISHED["llama-4-scout"]
    assert read(scout["text_config"]) == read(scout)
    nameless = {**scout, "text_config": {**scout["text_config"], "model_type": None}}
    with pytest.raises(ModelError, match="x: text_config: model_type is <missing>"):
        read(nameless)
    del nameless["text_config"]["model_type"]
    assert read(nameless) == read(scout)
    assert read({**scout, "tie_word_embeddings": True}).tied_embeddings
    assert not read(
        {**changed("llama-4-scout", tie_word_embeddings=False), "tie_word_embeddings": True}
    ).tied_embeddings
    kimi = {"model_type": "kimi_k25", "text_config": PUBLISHED["kimi-k2"]}
    assert read(kimi, "kimi-k2/config.json") == BUILT_IN_MODELS["kimi-k2"]
    outside = {"model_type": "llama4", "quantization_config": {"quant_method": "gptq"}}
    assert read({**scout, **outside}).published_dtype == "gptq"


@pytest.mark.parametrize(
    ("quantization", "shown"),
    [(None, ""), ({"quant_method": "fp8"}, "fp8"), ({"bits": 4}, "quantised"), ({"quant_method": "a\nb"}, "quantised")],
)
def test_how_weights_are_quantised_is_only_noted(quantization, shown):
    spec = read({**MIXTRAL, "quantization_config": quantization}, "mixtral-8x7b/config.json")
    assert spec.published_dtype == shown
    assert spec == BUILT_IN_MODELS["mixtral-8x7b"]


# -- what is refused --------------------------------------------------------------------------

KNOWN = "must be a family that hrm models lists"
REFUSED = [
    (changed("mixtral-8x7b", num_key_value_heads=5), "num_kv_heads is 5: must divide num_heads 32"),
    (changed("mixtral-8x7b", num_attention_heads=31), "num_attention_heads is 31: must divide"),
    (changed("mixtral-8x7b", num_experts_per_tok=9), "experts_per_token is 9: must be at most num"),
    (changed("mixtral-8x7b", tie_word_embeddings="no"), "tie_word_embeddings is 'no': must be"),
    (changed("mixtral-8x7b", layer_types=["conv"]), r"layer_types is \['conv'\]: must be a"),
    (changed("mixtral-8x7b", sliding_window=0), "sliding_window is 0: must be a positive integer"),
    (changed("mixtral-8x7b", quantization_config="fp8"), "quantization_config is 'fp8': must"),
    (changed("dbrx", ffn_config=None), "ffn_config is <missing>: must be an object"),
    (changed("dbrx", attn_config=8), "attn_config is 8: must be an object"),
    (changed("dbrx", ffn_config={"moe_top_k": 4}), "ffn_config: ffn_hidden_size is <missing>"),
    (changed("dbrx", n_heads=47), "n_heads is 47: must divide the hidden size 6144"),
    (changed("qwen3-30b-a3b", decoder_sparse_step=0), "decoder_sparse_step is 0: must be a positive"),
    (changed("qwen3-30b-a3b", mlp_only_layers=["0"]), r"mlp_only_layers is \['0'\]: must be"),
    (
        changed("qwen3-30b-a3b", mlp_only_layers=list(range(48))),
        "kinds is <none with experts>: must have routed experts",
    ),
    (changed("qwen2-57b-a14b", shared_expert_intermediate_size=None), "shared_expert_intermediate"),
    (
        changed("qwen2-57b-a14b", layer_types=28 * ["sliding_attention"]),
        "use_sliding_window is False: must be true where layer_types has sliding_attention",
    ),
    (changed("deepseek-v3", moe_layer_freq=2), "moe_layer_freq is 2: must be 1: the modelling code"),
    (changed("deepseek-v3", first_k_dense_replace=61), "kinds is <none with experts>"),
    (changed("deepseek-v3", first_k_dense_replace=-1), "first_k_dense_replace is -1: must be"),
    (changed("deepseek-v3", q_lora_rank=0), "q_lora_rank is 0: must be a positive integer"),
    (changed("deepseek-v3", sliding_window=4096), "sliding_window is 4096: is not of this arch"),
    (changed("deepseek-v2", mlp_bias=True), "mlp_bias is True: must be false"),
    (changed("gpt-oss-20b", layer_types=["full_attention"]), "must have one of the 24 layers each"),
    (changed("gpt-oss-20b", sliding_window=None), "sliding_window is <missing>: must be"),
    (changed("gpt-oss-20b", layer_types="full"), "layer_types is 'full': must be a list"),
    (changed("llama-4-scout", moe_layers=[48]), "kinds is <none with experts>"),
    (changed("llama-4-scout", attention_chunk_size=None), "attention_chunk_size is <missing>"),
    (changed("llama-4-scout", no_rope_layers=[1]), r"no_rope_layers is \[1\]: must have one"),
    ({**PUBLISHED["llama-4-scout"], "text_config": [1]}, r"text_config is \[1\]: must be an"),
    ({**MIXTRAL, "model_type": ["mixtral"]}, r"model_type is \['mixtral'\]: " + KNOWN),
    ({**MIXTRAL, "model_type": None}, "model_type is <missing>: " + KNOWN),
    ({**MIXTRAL, "model_type": "<\n>"}, r"model_type is < >: " + KNOWN),
    ({}, "model_type is <missing>: " + KNOWN),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_a_config_that_cannot_be_used_is_refused_by_file_and_key(tmp_path, config, message):
    path = tmp_path / "x"
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message) as caught:
        load_model(str(path))
    assert tmp_path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dense_model_is_told_that_only_mixtures_of_experts_are_planned():
    dense = {**without("mixtral-8x7b", "num_local_experts", "num_experts_per_tok"), "model_type": "llama"}
    with pytest.raises(ModelError, match=r"'llama': .* no key tells of experts, and hrm plans mixture-of-experts"):
        read({**dense, "num_local_experts": 0})


def test_an_unknown_mixture_of_experts_is_told_what_its_config_lacks():
    unknown = {**PUBLISHED["qwen3-30b-a3b"], "model_type": "new_moe"}
    with pytest.raises(ModelError, match=r"'new_moe': must be a family .*has experts \(moe_int.* has every size"):
        read(unknown)
    lacking = {key: value for key, value in unknown.items() if "per_tok" not in key}
    del lacking["num_key_value_heads"]
    with pytest.raises(ModelError, match=r"lacks num_key_value_heads, num_experts_per_tok; did you mean"):
        read(lacking)
    with pytest.raises(ModelError, match=r"'qwen3moe': .*; did you mean qwen3_moe\?"):
        read({**unknown, "model_type": "qwen3moe"})
    spelled = {**without("mixtral-8x7b", "num_local_experts"), "model_type": "zzz", "expert_count": 8}
    with pytest.raises(
        ModelError, match=r"experts \(num_experts_per_tok, expert_count\) and lacks num_experts; add a reader"
    ):
        read(spelled)


# Keys that a family cannot do without, and wrong values for an integer.
DECODER = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_experts_per_tok",
    "vocab_size",
    "intermediate_size",
)
LATENT = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
QWEN = (*DECODER[:-1], "moe_intermediate_size", "num_experts")
DEEPSEEK = (*DECODER, *LATENT, "moe_intermediate_size", "n_routed_experts")
LOCAL = (*DECODER, "num_local_experts")
NEEDED = {
    "mixtral-8x7b": LOCAL,
    "dbrx": ("d_model", "n_heads", "n_layers", "vocab_size"),
    "qwen2-57b-a14b": (*QWEN, "shared_expert_intermediate_size"),
    "qwen3-30b-a3b": QWEN,
    "deepseek-v2": DEEPSEEK,
    "deepseek-v3": DEEPSEEK,
    "kimi-k2": DEEPSEEK,
    "gpt-oss-20b": (*LOCAL, "sliding_window"),
    "llama-4-scout": (*LOCAL, "attention_chunk_size"),
    "glm-4.5-air": (*DECODER, "moe_intermediate_size", "n_routed_experts"),
    "phi-3.5-moe": LOCAL,
    "olmoe-1b-7b": (*DECODER, "num_experts"),
}
NO_SIZES = [None, "4096", "", 0, -1, 1.0, float("nan"), float("inf"), True, [4096], {"a": 1}, 10**9, 10**400]


@pytest.mark.parametrize("name", NEEDED)
def test_no_size_of_a_config_may_be_anything_but_a_positive_integer(name):
    for key in NEEDED[name]:
        others = {"experts_per_token": None} if key == "num_experts_per_tok" else {}
        for value in NO_SIZES:
            with pytest.raises(ModelError, match=rf"(^|: ){key} is .*must be a positive") as caught:
                read(changed(name, **others, **{key: value}))
            assert len(str(caught.value)) < 250
        with pytest.raises(ModelError, match=f"{key} is <missing>"):
            read(without(name, key, *others))


@pytest.mark.parametrize("name", NEEDED)
def test_whatever_a_key_holds_a_config_is_read_or_refused(name):
    deep = []
    for _ in range(500):
        deep = [deep]
    for key in decoder_keys(PUBLISHED[name]):
        for value in (*NO_SIZES, deep, "<", "\n", [[]], {}, [0, 1], ["a"], False, "x" * 5000):
            try:
                read(changed(name, **{key: value}))
            except ModelError as error:
                assert "\n" not in str(error)  # noqa: PT017 - what is read is welcome, too
                assert len(str(error)) < 600  # noqa: PT017


@pytest.mark.parametrize(
    "text",
    ["{", "[1, 2]", "", "null", b"\xff\xfe\x00", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "NaN"],
    ids=["cut", "list", "empty", "null", "binary", "deep", "huge", "number"],
)
def test_a_file_that_holds_no_json_object_is_refused(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ModelError, match=r"config\.json is <.*>: must") as caught:
        load_model(str(path))
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ModelError, match="--model is 'mixtral': must be one of mixtral-8x7b, mix"):
        load_model("mixtral")
    with pytest.raises(ModelError, match=r"did you mean deepseek-v3\?"):
        load_model("deepseek_v3")
    with pytest.raises(ModelError, match="must be one of mixtral-8x7b"):
        load_model("x" * 5000)


# -- keys that only running needs -------------------------------------------------------------


def test_numbers_words_and_token_ids_are_read_or_refused_by_key():
    keys = Keys({"eps": 1e-6, "act": "silu", "eos": [2, 7], "bos": 1, "null": None}, "x", "text_config")
    assert (keys.number("eps"), keys.number("null", default=3), keys.number("none", default=4)) == (1e-6, 3, 4)
    assert (keys.word("act", ("silu",)), keys.word("none", ("silu",), default="silu")) == ("silu", "silu")
    assert [keys.token_ids(key) for key in ("eos", "bos", "null", "none")] == [(2, 7), (1,), (), ()]
    readers = {
        "a positive number": (lambda wrong: wrong.number("key"), (0, -1.5, True, "1", [1], float("inf"), 10**400)),
        "silu": (lambda wrong: wrong.word("key", ("silu",)), ("gelu", ["silu"], 1, True)),
        "a token id or a list of them": (
            lambda wrong: wrong.token_ids("key"),
            (-1, True, "2", 2.0, [2, None], {"a": 1}),
        ),
    }
    for rule, (read_key, values) in readers.items():
        for value in values:
            with pytest.raises(ModelError, match=rf"^x: text_config: key is .*: must be {rule};"):
                read_key(Keys({"key": value}, "x", "text_config"))
    with pytest.raises(ModelError, match=r"^x: key is <missing>: must be a positive number"):
        Keys({}, "x").number("key")
