"""Readers of config.json: as published, as transformers understands it, and what is refused."""

import json

import pytest

from hrm.errors import ModelError
from hrm.model_spec import BUILT_IN_MODELS, Keys, load_model, spec_from_hf_config
from tests.hrm.published_configs import PUBLISHED, changed, decoder_keys, without
from tests.hrm.small_configs import stored_elements, transformers_config

MIXTRAL, DBRX = PUBLISHED["mixtral-8x7b"], PUBLISHED["dbrx"]


def read(config, where="x"):
    return spec_from_hf_config(config, where)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_reads_as_the_built_in_model(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PUBLISHED[name]))
    spec = load_model(str(folder))
    assert spec == load_model(str(folder / "config.json")) == BUILT_IN_MODELS[name]
    assert bool(spec.packing) == bool(spec.published_dtype)
    assert spec.published_dtype == BUILT_IN_MODELS[name].published_dtype


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_builds_the_same_model(name):
    config = transformers_config(PUBLISHED[name])
    assert stored_elements(config) == BUILT_IN_MODELS[name].parameters
    plain = {**config.to_dict(), "model_type": decoder_keys(PUBLISHED[name])["model_type"]}
    assert read(plain, f"{name}/config.json") == BUILT_IN_MODELS[name].without_packing


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
    assert read(kimi, "kimi-k2/config.json") == BUILT_IN_MODELS["kimi-k2"].without_packing
    outside = {"model_type": "llama4", "quantization_config": {"quant_method": "gptq"}}
    assert read({**scout, **outside}).published_dtype == "gptq"


@pytest.mark.parametrize(
    ("quantization", "shown"),
    [
        (None, ""),
        ({"quant_method": "fp8"}, "fp8"),
        ({"bits": 4}, "4-bit"),
        ({"quant_method": "gptq", "bits": 4}, "gptq 4-bit"),
        ({"quant_method": "a\nb"}, "quantised"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4}}}},
            "compressed-tensors",
        ),
    ],
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
