"""What published configs say of quantised weights, and which of our tensors are then packed."""

from typing import Any

import pytest

from hrm.errors import ModelError
from hrm.model_spec import decoder_keys, spec_from_hf_config
from hrm.model_spec.quantisation import Packing, quantisation
from hrm.model_spec.stored_formats import stored_formats
from tests.hrm.test_families import PUBLISHED  # whose weights are published quantised, most of them


def of(section: Any, **config: Any) -> Any:
    how = quantisation(decoder_keys({"quantization_config": section, **config}, "config.json"))
    assert how is not None
    return how


def format_of(section: Any, module: str, **config: Any) -> str | None:
    found = of(section, **config).of(module)
    return None if found is None else found.format.name


# What the published configs leave out, which is not among the kept ones' keys.
KIMI = ["re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"]
LINEAR = "model.language_model.layers.0."
LEFT_OUT = {
    "gpt-oss-20b": {"modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]},
    "MiniMax-M2.5": {"modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"]},
    "Kimi-K2.5": {"ignore": ["lm_head", *KIMI]},
    "Kimi-K3": {"ignore": [*KIMI, "re:.*lm_head.*", "re:.*vision_tower.*", "re:.*mm_projector.*"]},
    "Qwen3.5-122B-A10B-NVFP4": {
        "ignore": ["lm_head", LINEAR + "linear_attn*", LINEAR + "mlp.shared_expert*", LINEAR + "mlp.shared_expert_gate"]
    },
}


def published(name: str) -> Any:
    config = PUBLISHED[name]
    if "quantization_config" not in config and "text_config" in config:
        return {**config, "text_config": with_left_out(config["text_config"], name)}
    return with_left_out(config, name)


def with_left_out(config: Any, name: str) -> Any:
    return {**config, "quantization_config": {**config["quantization_config"], **LEFT_OUT.get(name, {})}}


def stored(config: Any, layer: int) -> dict[str, str]:
    how = quantisation(decoder_keys(config, "config.json"))
    assert how is not None
    return dict(stored_formats(how, spec_from_hf_config(config, "config.json").layers[layer], layer))


def packed_in(form: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, form)


# -- published models ------------------------------------------------------------------------------

ATTENTION, EXPERT, SHARED = ("qkv", "output"), ("w13", "w2"), ("shared_w13", "shared_w2")
LATENT = ("query_down", "query_up", "kv_down", "output")
EACH = [
    ("gpt-oss-20b", 3, packed_in("mxfp4", *EXPERT)),
    ("Qwen3-30B-A3B-FP8", 5, packed_in("fp8-b128", *ATTENTION, *EXPERT)),
    ("MiniMax-M2.5", 5, packed_in("fp8-b128", *ATTENTION, *EXPERT)),
    ("DeepSeek-V3.2", 0, packed_in("fp8-b128", *LATENT, "dense_w13", "dense_w2")),
    ("DeepSeek-V3.2", 9, packed_in("fp8-b128", *LATENT, *SHARED, *EXPERT)),
    ("Kimi-K2.5", 0, {}),
    ("Kimi-K2.5", 9, packed_in("int4-g32", *EXPERT)),
    ("Qwen1.5-MoE-A2.7B-Chat-GPTQ-Int4", 2, packed_in("int4-g128-f16", *ATTENTION, *SHARED, *EXPERT)),
    ("Qwen3.5-122B-A10B-NVFP4", 0, packed_in("nvfp4", *EXPERT)),  # whose delta rule and shared expert are plain
    ("Qwen3.5-122B-A10B-NVFP4", 3, packed_in("nvfp4", *ATTENTION, *SHARED, *EXPERT)),
    ("Kimi-K3", 9, packed_in("mxfp4", *EXPERT)),
]


@pytest.mark.parametrize(("name", "layer", "expected"), EACH)
def test_tensors_of_published_models(name: str, layer: int, expected: dict[str, str]) -> None:
    config = published(name)
    found = stored(config, layer)
    assert found == expected
    tensors = [tensor.name for tensor in spec_from_hf_config(config, "x").layers[layer].tensors]
    assert list(found) == sorted(found, key=tensors.index)
    assert set(found) <= set(tensors)


def test_plain_models_have_no_quantisation() -> None:
    for config in ({}, {"quantization_config": None}, {"quantization_config": {}}):
        assert quantisation(decoder_keys(config, "config.json")) is None


# -- names of modules ----------------------------------------------------------------------------------

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
GROUPS = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
GROUPED = {**GROUPS, "config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4}}}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
LAYER = "model.layers.1."


@pytest.mark.parametrize(
    ("section", "left_out", "packed"),
    [
        (
            {**FP8, "modules_to_not_convert": ["gate", "model.layers.1.self_attn", r"model.layers.\d.mlp.shared"]},
            ("mlp.gate", "self_attn.q_proj"),
            ("mlp.gate_proj", "mlp.experts.0.up_proj", "mlp.shared_experts.up_proj"),
        ),
        ({**FP8, "modules_to_not_convert": ["model.layers.*.self_attn"]}, ("self_attn.k_proj",), ("mlp.up_proj",)),
        ({**FP8, "ignored_layers": ["model.layers.1.mlp.up_proj"]}, ("mlp.up_proj",), ("mlp.experts.1.up_proj",)),
        (
            {**GROUPED, "ignore": ["lm_head", "re:.*self_attn.*", LAYER + "mlp.up_proj"]},
            ("self_attn.o_proj", "mlp.up_proj"),
            ("mlp.gate_proj", "mlp.up_proj.x"),
        ),
        ({**GROUPED, "ignore": ["re:model.language_model.layers.1.*mlp.*"]}, ("mlp.up_proj",), ("self_attn.o_proj",)),
        ({**AWQ, "modules_to_not_convert": ["mlp.shared_expert"]}, ("mlp.shared_expert_gate",), ("mlp.up_proj",)),
        ({**GPTQ, "dynamic": {r"-:.*\.shared.*": {}}}, ("mlp.shared_expert.up_proj",), ("mlp.up_proj",)),
        (
            {**GPTQ, "modules_in_block_to_quantize": [["self_attn.k_proj", "self_attn.v_proj"], ["mlp.up_proj"]]},
            ("self_attn.q_proj", "mlp.down_proj"),
            ("self_attn.v_proj", "mlp.up_proj"),
        ),
        (
            {**NVFP4, "ignore": ["lm_head", "model.language_model.layers.1.mlp.shared*", "*.self_attn", "x"]},
            ("self_attn.q_proj", "mlp.shared_expert.up_proj"),
            ("mlp.up_proj",),
        ),
        ({"quant_method": "mxfp4"}, ("mlp.up_proj", "mlp.shared_experts.up_proj"), ("mlp.experts.gate_up_proj",)),
    ],
)
def test_modules_are_left_out_as_each_tool_names_them(section: Any, left_out: Any, packed: Any) -> None:
    assert [format_of(section, LAYER + name) for name in left_out] == [None] * len(left_out)
    assert None not in [format_of(section, LAYER + name) for name in packed]


def test_targets_by_name_count_before_those_by_class() -> None:
    """The experts of one kind of format in a model of another."""
    int8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
    groups = {
        "a": {"targets": ["Linear"], "weights": int8, "format": "int-quantized"},
        "b": {"targets": [r"re:.*\.experts\..*"], "weights": INT4, "format": "pack-quantized"},
        "c": {"targets": [LAYER + "mlp.up_proj"], "weights": None},
    }
    section = {**GROUPS, "format": "mixed-precision", "config_groups": groups}
    assert format_of(section, LAYER + "mlp.experts.7.up_proj") == "int4-g32"
    assert format_of(section, LAYER + "mlp.up_proj") == "int8"
    assert format_of(section, LAYER + "mlp.experts.7.up_proj", torch_dtype="float16") == "int4-g32-f16"


def test_dynamic_changes_what_some_modules_have() -> None:
    section = {**GPTQ, "sym": False, "dynamic": {r"+:.*\.experts\..*": {"bits": 8, "group_size": 64, "sym": True}}}
    assert format_of(section, LAYER + "mlp.up_proj") == "int4-g128-f16-z"
    assert format_of(section, LAYER + "mlp.experts.3.up_proj") == "int8-g64-f16"


@pytest.mark.parametrize(
    ("section", "name", "packing"),
    [
        ({"quant_method": "fp8"}, "fp8", Packing.FP8),
        ({**GPTQ, "group_size": -1, "desc_act": True}, "int4", Packing.GPTQ),
        ({**GPTQ, "desc_act": True, "checkpoint_format": "gptq_v2"}, "int4-g128-f16-o", Packing.GPTQ_V2),
        ({**AWQ, "version": "GEMM"}, "int4-g128-f16-z", Packing.AWQ),
        (
            {**GROUPS, "config_groups": {"g": {"targets": ["Linear"], "weights": {**INT4, "symmetric": False}}}},
            "int4-g32-z",
            Packing.PACKED_INT,
        ),
        (
            {**GROUPS, "config_groups": {"g": {"targets": ["Linear"], "weights": {**INT4, "actorder": "group"}}}},
            "int4-g32-o",
            Packing.PACKED_INT,
        ),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8", Packing.MODELOPT),
    ],
)
def test_formats(section: Any, name: str, packing: Packing) -> None:
    found = of(section).of(LAYER + "mlp.up_proj")
    assert (found.format.name, found.packing) == (name, packing)


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("fp8", "quantization_config is 'fp8': must be an object"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method is 'bitsandbytes': must be of a method"),
        ({"quant_method": ["gptq"]}, "quant_method is ['gptq']"),
        ({"group_size": 64, "bits": 4}, "group_size is 64: must be of a method that is read"),
        ({**FP8, "fmt": "e5m2"}, "fmt is 'e5m2': must be e4m3"),
        ({**FP8, "weight_block_size": [1, 128]}, "weight_block_size is [1, 128]: must be the rows and columns"),
        ({**FP8, "weight_block_size": [0, 0]}, "weight_block_size is [0, 0]"),
        ({**FP8, "modules_to_not_convert": "gate"}, "modules_to_not_convert is 'gate': must be a list"),
        ({**FP8, "modules_to_not_convert": ["(a+)+b"]}, "must repeat no group"),
        ({**FP8, "modules_to_not_convert": [".*" * 9]}, "must repeat no group"),
        ({**FP8, "modules_to_not_convert": ["a(b"]}, "must be a regular expression"),
        ({**GPTQ, "bits": 3}, "bits is 3: must be 4 or 8"),
        ({**GPTQ, "group_size": 0}, "group_size is 0: must be a positive integer"),
        ({**GPTQ, "group_size": 10**9}, "group_size is 1000000000"),
        ({**GPTQ, "bits": 8, "sym": False}, "sym is False: must be true for 8 bits"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({**GPTQ, "is_marlin_format": True}, "is_marlin_format is True"),
        ({**GPTQ, "dynamic": {"+:a": {"bits": 2}}}, "dynamic: +:a: bits is 2"),
        ({**GPTQ, "dynamic": {"a": 3}}, "dynamic is 'a': must have an object"),
        ({**GPTQ, "modules_in_block_to_quantize": [3]}, "must be lists of names"),
        ({**AWQ, "version": "gemv"}, "version is 'gemv': must be gemm"),
        ({**AWQ, "zero_point": False}, "zero_point is False"),
        ({**GROUPS, "config_groups": {}}, "config_groups"),
        ({**GROUPED, "format": "marlin-24"}, "format is 'marlin-24'"),
        ({**GROUPED, "format": "float-quantized"}, "num_bits is 4: must be 8 bits of float in float-quantized"),
        ({**GROUPED, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo is 'W4A8_AWQ'"),
        ({**NVFP4, "group_size": 32}, "group_size is 32: must be 16"),
    ],
)
def test_what_is_not_read_is_named(section: Any, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        of(section)
    assert message in str(caught.value)
    assert str(caught.value).startswith("config.json: quantization_config")
    assert caught.value.remedy


def test_experts_in_fp4_beside_fp8_are_named() -> None:
    with pytest.raises(ModelError, match="expert_dtype is 'fp4'"):
        of(FP8, expert_dtype="fp4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ignore": [r"re:.*experts\.0\.up_proj"]},
            "w13 is <quantised>: must not join matrices in different formats: int4-g32 and plain",
        ),
        (
            {
                "config_groups": {
                    "a": {"targets": ["re:.*gate_proj"], "weights": INT4},
                    "b": {"targets": ["Linear"], "weights": {**INT4, "num_bits": 8}},
                }
            },
            "w13 is <quantised>: must not join matrices in different formats: int4-g32 and int8-g32",
        ),
    ],
)
def test_tensors_that_cannot_be_joined_are_named(changes: Any, message: str) -> None:
    config = {**PUBLISHED["Qwen3-30B-A3B-FP8"], "quantization_config": {**GROUPED, **changes}}
    with pytest.raises(ModelError, match=r"model\.layers\.4\.") as caught:
        stored(config, 4)
    assert message in str(caught.value)


def test_parts_of_broken_groups_are_named() -> None:
    section = {**FP8, "weight_block_size": [100, 100]}
    with pytest.raises(ModelError, match="w13 is <quantised>: must have parts of whole groups in fp8-b100, not 768"):
        stored({**PUBLISHED["Qwen3-30B-A3B-FP8"], "quantization_config": {**section, "ignored_layers": ["q_proj"]}}, 4)


def test_a_matrix_that_joins_packed_and_plain_ones_is_plain() -> None:
    """Qwen3-Next's, whose decays and steps are not quantised."""
    config = {
        **PUBLISHED["Qwen3-Next-80B-A3B"],
        "quantization_config": {**FP8, "modules_to_not_convert": ["model.layers.0.linear_attn.in_proj_ba"]},
    }
    assert stored(config, 0) == packed_in("fp8-b128", "output", *SHARED, *EXPERT)
    config["quantization_config"] = {"quant_method": "fp8"}  # whose scales are of rows
    assert stored(config, 1) == packed_in("fp8", "projections", "output", *SHARED, *EXPERT)
