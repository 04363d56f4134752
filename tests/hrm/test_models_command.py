"""`hrm models`: the list, one model in detail, and the same for scripts."""

import json

import pytest

from hrm.cli import main
from hrm.contract.families import EXECUTED_FAMILIES
from hrm.formats import Formats
from hrm.model_spec import BUILT_IN_MODELS
from hrm.model_spec.families import FAMILY_READERS
from hrm.units import format_bytes
from tests.hrm.published_configs import PUBLISHED

DEEPSEEK_V3 = """\
deepseek-v3 (deepseek_v3)
parameters  671.0 B (671,026,419,200)
active      37.6 B a token, 6%
weights     1.34 TB in bfloat16; as published and planned, 674 GB: matrices in fp8-b128
experts     8 of 256 a token, 44.1 MB each (7168 x 2048); shared: 44.1 MB (7168 x 2048)
attention   latent: 128 heads of 128 + 64 rotary, values 128; cached 512 + 64; queries through 1536
embedding   129280 tokens x 7168 (1.85 GB), and an LM head beside it
KV cache    70.3 kB a token in all layers, 1.15 kB in each
runs        with executor run

layers        count  bytes each  outside experts  routed experts   attend to
dense FFN         3      600 MB           600 MB            none  all tokens
with experts     58     11.5 GB           252 MB    256: 11.3 GB  all tokens
all              61      670 GB
"""


@pytest.fixture
def models(capsys):
    """What `hrm models` prints, without the spaces at the ends of lines."""

    def run(*args) -> str:
        main(["models", *map(str, args)])
        out, err = capsys.readouterr()
        assert err == ""
        return "".join(line.rstrip() + "\n" for line in out.splitlines())

    return run


def test_the_list_has_a_row_for_every_model_and_fits_a_narrow_terminal(models):
    lines = models().splitlines()
    blank = lines.index("")
    assert [line.split()[0] for line in lines[1 : blank - 1]] == list(BUILT_IN_MODELS)
    assert max(map(len, lines)) <= 100
    row = next(line for line in lines if line.startswith("glm"))
    assert row.split() == [
        "glm-4.5-air",
        "106.9",
        "B",
        "13.4",
        "B",
        "46",
        "8",
        "of",
        "128",
        "+",
        "shared",
        "4.68",
        "GB",
        "34.6",
        "MB",
        "188",
        "kB",
    ]


def test_the_list_says_of_every_family_whether_it_is_planned_and_run(models):
    lines = models().splitlines()
    rows = [line.split()[:3] for line in lines[lines.index("") + 2 : -1]]
    said = {family: (plans, runs) for family, plans, runs in rows}
    assert list(said) == list(FAMILY_READERS)
    assert {runs for _, runs in said.values()} == {"yes", "no"}
    for family, (plans, runs) in said.items():
        assert (plans, runs) == ("yes", "yes" if family in EXECUTED_FAMILIES else "no")


def test_a_model_is_shown_with_its_kinds_of_layers(models):
    assert models("deepseek-v3") == DEEPSEEK_V3


@pytest.mark.parametrize("name", BUILT_IN_MODELS)
def test_every_model_fits_a_narrow_terminal(models, name):
    assert max(map(len, models(name).splitlines())) <= 100


def test_windows_are_told_with_what_they_save(models):
    assert "24.6 kB beyond the windows: 12 of 24 layers keep 128 tokens at most" in models("gpt-oss-20b")
    shown = models("llama-4-scout")
    assert "36 of 48 layers keep 8192 tokens at most" in shown
    assert "grouped-query: 40 query heads on 8 of 128" in shown
    assert "multi-head: 16 query heads on 16 of 128" in models("olmoe-1b-7b")


def test_a_checkpoint_is_shown_as_its_config_says(models, tmp_path):
    folder = tmp_path / "[bold]mine"
    folder.mkdir()
    quantized = {"quant_method": "[red]q"}
    config = {**PUBLISHED["mixtral-8x7b"], "tie_word_embeddings": True}
    config["quantization_config"] = quantized
    (folder / "config.json").write_text(json.dumps(config))
    shown = models(folder)
    assert shown.startswith("[bold]mine (mixtral)\n")
    assert "(published: [red]q; plans use the dtype that you choose)" in shown
    assert "tied to the LM head" in shown
    assert models(folder / "config.json") == shown


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "gpt-oss-120b"])
def test_json_has_all_that_is_shown(models, name):
    spec, found = BUILT_IN_MODELS[name], json.loads(models(name, "--json"))
    assert found == json.loads(models("--json"))[name]
    # The size of gpt-oss-120b's files on the Hub.
    assert found["weight_bytes"] == (65_248_815_744 if name == "gpt-oss-120b" else 2 * found["parameters"])
    kinds = found["layer_kinds"]
    assert sum(kind["layers"] for kind in kinds) == found["num_layers"]
    in_layers = sum(kind["layers"] * kind["layer_bytes"] for kind in kinds)
    assert in_layers == found["total_layer_bytes"]
    assert in_layers + found["embedding_bytes"] + found["head_bytes"] == found["weight_bytes"]
    for kind in kinds:
        experts = kind["num_experts"] * found["expert_bytes"]
        assert kind["layer_bytes"] == kind["dense_bytes"] + experts
    every_token = sum(kind["layers"] * kind["kv_bytes_per_token"] for kind in kinds)
    late_token = sum(k["layers"] * k["kv_bytes_per_token"] for k in kinds if not k["window"])
    assert found["kv_bytes_per_token"] == every_token == spec.kv_bytes_per_token(Formats.of("bfloat16"))
    assert found["kv_bytes_per_token_beyond_windows"] == late_token
    assert {kind["mixer"].get("kv_rank") for kind in kinds} == {512 if "deepseek" in name else None}


def test_a_hybrid_is_shown_with_both_kinds_of_attention(models, tmp_path):
    config = {**PUBLISHED["qwen3-30b-a3b"], "model_type": "qwen3_next", "shared_expert_intermediate_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shown = models(tmp_path)
    assert "in 36 layers  gated delta: values in 32 heads of 128 on keys in 16 of 128, convolution over 4" in shown
    assert "in 12 layers  grouped-query: 32 query heads on 4 of 128, gated" in shown
    state = 36 * (32 * 128 * 128 * 4 + (2 * 16 + 32) * 128 * 3 * 2)
    assert f"24.6 kB a token in all layers, and {format_bytes(state)} a sequence" in shown
    assert max(map(len, shown.splitlines())) <= 100
