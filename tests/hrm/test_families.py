"""Every family against transformers: parameters of small and of published models, and how far layers reach."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hrm.errors import ModelError
from hrm.model_spec import BUILT_IN_MODELS, Keys, decoder_keys, read_spec, spec_from_hf_config
from hrm.model_spec.families import FAMILY_READERS
from tests.contracts.selection import chosen
from tests.hrm.small_configs import VARIANTS, WINDOWED, stored_elements, transformers_config

PUBLISHED = {
    row["name"]: row["config"]
    for row in map(json.loads, (Path(__file__).parent / "data" / "published_configs.jsonl").read_text().splitlines())
}


def read(config):
    return spec_from_hf_config(config, "x")


def test_every_family_is_tried():
    published = {spec_from_hf_config(config, name).family for name, config in PUBLISHED.items()}
    built_in = {spec.family for spec in BUILT_IN_MODELS.values()}
    small = {model_type for model_type, *_ in VARIANTS}
    assert published | built_in | small | {"bailing_moe_v2"} == set(FAMILY_READERS)
    ling = PUBLISHED["Ling-mini-2.0"]
    assert read({**ling, "model_type": "bailing_moe_v2"}) == replace(read(ling), family="bailing_moe_v2")


@pytest.mark.parametrize(("model_type", "sizes", "changes"), VARIANTS)
def test_small_models_have_the_parameters_that_transformers_stores(model_type, sizes, changes):
    given = {"model_type": model_type, **sizes, **changes}
    config = transformers_config(given)
    spec = read(given)
    assert spec.parameters == stored_elements(config)
    assert read(config.to_dict()) == spec


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


# -- published models ---------------------------------------------------------------------------

# Of these transformers knows no model: what their makers say, in billions.
ADVERTISED = {"Ling-mini-2.0": 16.26}
# It keeps matrices of LongCat's experts that compute nothing.
LONGCAT = {
    "model_type": "longcat_flash",
    "vocab_size": 131072,
    "hidden_size": 6144,
    "num_layers": 28,
    "num_attention_heads": 64,
    "ffn_hidden_size": 12288,
    "expert_ffn_hidden_size": 2048,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_topk": 12,
    "n_routed_experts": 512,
    "zero_expert_num": 256,
}
STORED = {
    "DeepSeek-V3.2": "fp8",
    "DeepSeek-V4-Flash": "fp8, fp4 experts",
    "Kimi-K2.5": "int4",
    "Kimi-K3": "mxfp4",
    "MiMo-V2-Flash": "fp8",
    "MiniMax-M2.5": "fp8",
    "Qwen1.5-MoE-A2.7B-Chat-GPTQ-Int4": "gptq 4-bit",
    "Qwen3-30B-A3B-FP8": "fp8",
    "Qwen3.5-122B-A10B-NVFP4": "nvfp4",
    "dbrx-instruct-4bit-mlx": "4-bit",
    "gpt-oss-20b": "mxfp4 experts",
}


def as_transformers_takes_it(config):
    """A published config's text part, without what transformers' own classes refuse."""
    keys = {key: value for key, value in decoder_keys(config, "x").values.items() if value is not None}
    keys.pop("quantization", None)
    if keys["model_type"] == "dbrx":
        keys["attn_config"] = {key: keys["attn_config"][key] for key in ("clip_qkv", "kv_n_heads", "rope_theta")}
        keys["ffn_config"] = {
            key: keys["ffn_config"][key] for key in ("ffn_hidden_size", "moe_num_experts", "moe_top_k")
        }
    return {**keys, "model_type": "step3p5" if keys["model_type"] == "step3p7" else keys["model_type"]}


@pytest.mark.parametrize("name", sorted(set(PUBLISHED) - set(ADVERTISED) - {"Kimi-K3"}))
def test_a_published_model_has_the_parameters_that_transformers_stores(name):
    config = as_transformers_takes_it(PUBLISHED[name])
    assert read(PUBLISHED[name]).parameters == stored_elements(transformers_config(config))


@pytest.mark.parametrize("name", ADVERTISED)
def test_a_published_model_that_transformers_lacks_has_the_parameters_that_are_advertised(name):
    assert round(read(PUBLISHED[name]).parameters / 1e9, 2) == ADVERTISED[name]


def test_longcat_has_the_parameters_that_are_advertised():
    spec = read(LONGCAT)
    assert int(spec.parameters / 1e9) == 560
    assert 18.6e9 < spec.active_parameters - spec.embedding_parameters < 31.3e9
    assert round((spec.active_parameters - spec.embedding_parameters) / 1e9) == 27


def test_kimi_k3_without_what_only_it_has_is_as_transformers_builds_it():
    keys = decoder_keys(PUBLISHED["Kimi-K3"], "x")
    own = ("routed_expert_hidden_size", "latent_moe_use_norm", "mla_use_output_gate")
    plain = {key: value for key, value in keys.values.items() if key not in own and value is not None}
    linear = {key: value for key, value in plain["linear_attn_config"].items() if key != "use_full_rank_gate"}
    plain |= {"linear_attn_config": linear, "hidden_act": "silu"}
    assert read_spec(Keys(plain, "x")).parameters == stored_elements(transformers_config(plain))
    # With it: a gate as wide as the values, of delta and latent layers, and experts half as wide at their ends.
    spec = read(PUBLISHED["Kimi-K3"])
    gates = 69 * (7168 * 12288 - 128 * (7168 + 12288)) + 24 * 7168 * 12288
    experts = 92 * (896 * 3 * 3072 * (3584 - 7168) + 2 * 7168 * 3584 + 3584)
    assert spec.parameters == read(plain).parameters + gates + experts


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_says_how_weights_are_stored(name):
    assert read(PUBLISHED[name]).published_dtype == STORED.get(name, "")


WRONG = [None, "<\n", 0, -1, 1.5, True, [4096], [["a"]], {"a": 1}, 10**400]


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("half", chosen((0, 1), at=(0,)))
def test_whatever_a_key_of_a_published_config_holds_it_is_read_or_refused(name, half):
    """Every other value of each key, and the others of the same key in the next model."""
    keys, first = decoder_keys(PUBLISHED[name], "x").values, half + list(PUBLISHED).index(name)
    for place, key in enumerate(sorted(keys)):
        for value in WRONG[(first + place) % 2 :: 2]:
            try:
                read({**keys, key: value})
            except ModelError as error:
                assert "\n" not in str(error)  # noqa: PT017 - what is read is welcome, too
                assert len(str(error)) < 700  # noqa: PT017


# -- where a text part is, and what is told of a config that is not read --------------------------


@pytest.mark.parametrize(
    "path", [("text_config",), ("llm_config",), ("language_config",), ("thinker_config", "text_config")]
)
def test_a_text_part_is_found_wherever_configs_keep_it(path):
    text = PUBLISHED["Qwen3-30B-A3B-FP8"]
    quantised, config = text["quantization_config"], {key: value for key, value in text.items() if "quant" not in key}
    config |= {"eos_token_id": 1, "bos_token_id": 2}
    for name in reversed(path):
        config = {"model_type": "seeing", "eos_token_id": [3, 4], name: config}
    keys = decoder_keys(config, "x")
    assert (keys.token_ids("eos_token_id"), keys.token_ids("bos_token_id")) == ((3, 4), (2,))
    spec = read({**config, "quantization_config": quantised})
    assert spec == replace(read(text), name=spec.name)
    assert spec.published_dtype == "fp8"


@pytest.mark.parametrize(
    "spelling", ["num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k", "moe_top_k"]
)
@pytest.mark.parametrize("experts", ["moe_num_experts", "n_routed_experts", "num_local_experts"])
def test_keys_are_found_under_all_their_spellings(spelling, experts):
    config = dict(PUBLISHED["Qwen3-30B-A3B-FP8"])
    spelled = {spelling: config.pop("num_experts_per_tok"), experts: config.pop("num_experts")}
    assert read({**config, **spelled}) == read(PUBLISHED["Qwen3-30B-A3B-FP8"])


def test_layers_that_differ_in_their_experts_are_refused_by_what_differs():
    config = PUBLISHED["Hunyuan-A13B"]
    for key in ("moe_topk", "moe_intermediate_size", "num_shared_expert"):
        uneven = {**config, key: [*config[key][1:], 2 * config[key][0]]}
        with pytest.raises(ModelError, match=f"{key} is .*: must be the same in all layers, for a plan to count"):
            read(uneven)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_mixture_of_experts_is_never_told_to_be_none(name):
    unknown = {**decoder_keys(PUBLISHED[name], "x").values, "model_type": "zzz"}
    with pytest.raises(ModelError, match=r"must be a family that hrm models lists; it has experts \(") as caught:
        read(unknown)
    assert "no key tells" not in str(caught.value)
