"""Models: totals as advertised, configs as published, and what is refused."""

import json

import pytest

from hrm.errors import ModelError
from hrm.model_spec import BUILT_IN_MODELS, load_model, spec_from_hf_config
from tests.hrm.support import tiny_spec

MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
    "tie_word_embeddings": False,
}  # fmt: skip
DBRX = {
    "model_type": "dbrx", "d_model": 6144, "n_heads": 48, "n_layers": 40, "vocab_size": 100352,
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("mixtral-8x7b", 46.7, 12.9), ("mixtral-8x22b", 140.6, 39.2), ("dbrx", 131.6, 36.5)],
)
def test_parameters_are_as_advertised(name, total, active):
    spec = BUILT_IN_MODELS[name]
    assert round(spec.parameters / 1e9, 1) == total
    assert round(spec.active_parameters / 1e9, 1) == active


@pytest.mark.parametrize(("config", "name"), [(MIXTRAL, "mixtral-8x7b"), (DBRX, "dbrx")])
def test_a_published_config_reads_as_the_built_in_model(tmp_path, config, name):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model(str(folder)) == BUILT_IN_MODELS[name]
    assert load_model(str(folder / "config.json")) == BUILT_IN_MODELS[name]


def test_the_class_default_of_dbrx_shows_in_the_total():
    ffn = {**DBRX["ffn_config"], "ffn_hidden_size": 3584}
    wrong = spec_from_hf_config({**DBRX, "ffn_config": ffn}, "config.json")
    assert round(wrong.parameters / 1e9) == 47


def test_parameters_are_those_of_the_tensors():
    spec = tiny_spec(num_layers=3, head_dim=24)
    shapes = 3 * [
        (64, 4 * 24), (64, 2 * 24), (64, 2 * 24), (4 * 24, 64), (64, 4), (64,), (64,),
        *4 * [(64, 96), (96, 64), (64, 96)],
    ] + [(256, 64), (256, 64), (64,)]  # fmt: skip
    sizes = [rows[0] * (rows[1] if len(rows) > 1 else 1) for rows in shapes]
    assert spec.parameters == sum(sizes)
    assert spec.kv_bytes_per_token("float32") == 3 * 2 * (2 * 24) * 4
    tied = spec_from_hf_config({**MIXTRAL, "tie_word_embeddings": True}, "x")
    assert BUILT_IN_MODELS["mixtral-8x7b"].parameters - tied.parameters == 32000 * 4096


def test_experts_hit_are_those_of_uniform_routing():
    spec = tiny_spec(num_experts=8, experts_per_token=2)
    assert spec.experts_hit(1) == pytest.approx(2)
    assert spec.experts_hit(2) == pytest.approx(8 * (1 - 0.75**2))
    assert spec.experts_hit(1000) == pytest.approx(8)


def test_optional_keys_have_the_defaults_of_the_format():
    config = {k: v for k, v in MIXTRAL.items() if k != "num_key_value_heads"}
    assert spec_from_hf_config(config, "x").num_kv_heads == 32
    assert spec_from_hf_config({**MIXTRAL, "head_dim": 96}, "x").head_dim == 96
    assert spec_from_hf_config({**MIXTRAL, "head_dim": None}, "x").head_dim == 128


REFUSED = [
    ({**MIXTRAL, "hidden_size": None}, "hidden_size is <missing>: must be a positive integer"),
    ({**MIXTRAL, "vocab_size": "32000"}, "vocab_size is '32000': must be a positive integer"),
    ({**MIXTRAL, "num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({**MIXTRAL, "num_hidden_layers": True}, "num_hidden_layers is True"),
    ({**MIXTRAL, "num_local_experts": 8.0}, "num_local_experts is 8.0"),
    ({**MIXTRAL, "num_key_value_heads": 5}, "num_kv_heads is 5: must divide num_heads 32"),
    (
        {**MIXTRAL, "num_experts_per_tok": 9},
        "experts_per_token is 9: must be at most num_experts 8",
    ),
    ({**MIXTRAL, "model_type": "llama"}, "model_type is 'llama': must be one of mixtral, dbrx"),
    ({**MIXTRAL, "model_type": ["mixtral"]}, "model_type is .*: must be one of"),
    ({}, "model_type is None: must be one of"),
    ({**DBRX, "ffn_config": None}, "ffn_config is <missing>: must be an object"),
    ({**DBRX, "attn_config": 8}, "attn_config is 8: must be an object"),
    ({**DBRX, "ffn_config": {"moe_top_k": 4}}, "ffn_config: ffn_hidden_size is <missing>"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_a_config_that_cannot_be_used_is_refused_by_file_and_key(tmp_path, config, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message) as caught:
        load_model(str(path))
    assert tmp_path.name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1, 2]", "", "null", b"\xff\xfe\x00"])
def test_a_file_that_holds_no_json_object_is_refused(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ModelError, match=r"config\.json is <.*>: must"):
        load_model(str(path))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ModelError, match="--model is 'mixtral': must be one of mixtral-8x7b, mix"):
        load_model("mixtral")
