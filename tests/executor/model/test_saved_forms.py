"""Checkpoints that transformers loads, however saved: the same logits, or a true reason."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from executor.checkpoint import Checkpoint
from executor.errors import CheckpointError
from executor.families import family_for
from hrm.errors import HrmError, ModelError
from tests.executor import reference
from tests.executor.tiny_models import DBRX, edit_json, random_prompts, save_tiny, transformers_logits

WHOLE = "model.safetensors"
PROMPT = random_prompts(1, longest=20, seed=5)[0]


def loaded(folder):
    with Checkpoint.open(folder) as checkpoint:
        family = family_for(checkpoint.config, checkpoint.config_path)
        arch = family.architecture(checkpoint.config, checkpoint.config_path)
        checkpoint.check(family.expected_tensors(arch, checkpoint.names))
        return reference.load(family, checkpoint, arch)


def check_same_logits(folder):
    """Ours are those of transformers, which reads the same files."""
    ours = reference.forward(loaded(folder), PROMPT)
    torch.testing.assert_close(ours, transformers_logits(folder, PROMPT), atol=2e-4, rtol=2e-4)


def refused(folder, *parts, error: type[HrmError] = CheckpointError):
    with pytest.raises(error) as caught:
        loaded(folder)
    message = str(caught.value)
    for part in (*parts, caught.value.remedy):
        assert part in message
    assert "\n" not in message


@pytest.fixture
def copy(tiny_folders, tmp_path):
    return lambda name: shutil.copytree(tiny_folders[name], tmp_path / "model")


def rewrite(folder, change):
    tensors = load_file(folder / WHOLE)
    save_file(change(tensors), folder / WHOLE, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["wide heads", "tied", DBRX])
@pytest.mark.parametrize("shard", ["50GB", "60KB"])
def test_experts_saved_as_one_tensor(name, shard, tmp_path):
    save_tiny(name, tmp_path, save_original_format=False, max_shard_size=shard)
    with Checkpoint.open(tmp_path) as checkpoint:
        names = json.dumps(list(checkpoint.names))
    assert ("mlp.experts.gate_up_proj" in names) == (name != DBRX)
    check_same_logits(tmp_path)


def test_fused_experts_of_another_size_are_refused(tmp_path):
    save_tiny("wide heads", tmp_path, save_original_format=False)
    edit_json(tmp_path / "config.json", intermediate_size=39)
    refused(tmp_path, "gate_up_proj", "(8, 80, 32)", "(8, 78, 32)")


@pytest.mark.parametrize("factor", [1.0, -0.5])
def test_tied_embeddings_with_a_stored_head(copy, factor):
    folder = copy("tied")
    rewrite(folder, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"] * factor})
    check_same_logits(folder)


def test_tied_embeddings_stored_as_the_head_alone(copy):
    folder = copy("tied")
    rewrite(
        folder,
        lambda t: {
            "lm_head.weight" if name == "model.embed_tokens.weight" else name: tensor for name, tensor in t.items()
        },
    )
    check_same_logits(folder)


def test_embedding_that_is_not_tied_is_not_taken_from_the_head(copy):
    folder = copy("wide heads")
    rewrite(folder, lambda t: {k: v for k, v in t.items() if k != "model.embed_tokens.weight"})
    refused(folder, "model.embed_tokens.weight", "<missing>")


BUFFERS = (
    "model.rotary_emb.inv_freq",
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.layers.1.self_attn.rotary_emb.cos_cached",
    "model.layers.1.self_attn.masked_bias",
)


def test_harmless_buffers_are_ignored(copy):
    folder = copy("wide heads")
    rewrite(folder, lambda t: {**t, **{name: torch.ones(3) for name in BUFFERS}})
    check_same_logits(folder)


@pytest.mark.parametrize(
    ("inner", "head"),
    [
        ("model.language_model.", "lm_head."),
        ("language_model.model.", "language_model.lm_head."),
        ("thinker.model.", "thinker.lm_head."),
    ],
)
def test_text_part_of_a_multimodal_model(copy, inner, head):
    folder = copy("wide heads")
    before = reference.forward(loaded(folder), PROMPT)
    others = {
        "model.visual.blocks.0.weight": 1,
        "vision_tower.a": 1,
        "model.audio_tower.layers.9.w": 1,
        "mtp.fc.weight": 1,
    }

    def renamed(name):
        return (
            inner + name.removeprefix("model.") if name.startswith("model.") else head + name.removeprefix("lm_head.")
        )

    rewrite(
        folder,
        lambda t: {renamed(k): v for k, v in t.items()} | {name: torch.ones(size) for name, size in others.items()},
    )
    assert torch.equal(reference.forward(loaded(folder), PROMPT), before)
    wrong = f"{inner}layers.0.input_layernorm.weight"
    rewrite(folder, lambda t: t | {wrong: torch.ones(31)})
    refused(folder, wrong, "(31,)")


def test_layers_that_predict_further_ahead_are_left_out(copy):
    """As many as the config says, or those with a matrix that no other layer has."""
    folder = copy("wide heads")
    before = reference.forward(loaded(folder), PROMPT)
    rewrite(folder, lambda t: t | {"model.layers.3.mlp.gate.weight": torch.ones(3)})
    refused(folder, "model.layers.3.mlp.gate.weight", "not used")
    edit_json(folder / "config.json", num_nextn_predict_layers=1)
    assert torch.equal(reference.forward(loaded(folder), PROMPT), before)
    rewrite(folder, lambda t: t | {"model.layers.4.mlp.gate.weight": torch.ones(3)})
    refused(folder, "model.layers.4.mlp.gate.weight", "not used")
    rewrite(folder, lambda t: t | {"model.layers.4.eh_proj.weight": torch.ones(3)})
    assert torch.equal(reference.forward(loaded(folder), PROMPT), before)


def test_some_of_many_wrong_names_are_told(copy):
    folder = copy("wide heads")
    rewrite(folder, lambda t: t | {f"model.layers.{i}.self_attn.q_proj.bias": torch.ones(3) for i in range(3)})
    rewrite(folder, lambda t: t | {f"model.layers.{i}.self_attn.k_proj.bias": torch.ones(3) for i in range(3)})
    refused(folder, "model.layers.0.self_attn.k_proj.bias is <not used, as are", "0.self_attn.q_proj.bias", "3 more>")
    rewrite(folder, lambda t: {name: tensor for name, tensor in t.items() if ".layers.2." not in name})
    refused(folder, "model.layers.2.input_layernorm.weight is <missing, as are ", " more>")


def test_mixed_and_double_precision(copy):
    folder = copy("wide heads")
    kinds = (torch.float64, torch.float32)
    rewrite(folder, lambda t: {name: tensor.to(kinds[index % 2]) for index, (name, tensor) in enumerate(t.items())})
    check_same_logits(folder)


@pytest.mark.parametrize("name", ["weights.safetensors", "model.fp32.safetensors"])
def test_one_file_of_another_name(copy, name):
    folder = copy("wide heads")
    before = reference.forward(loaded(folder), PROMPT)
    (folder / WHOLE).rename(folder / name)
    assert torch.equal(reference.forward(loaded(folder), PROMPT), before)


def test_shards_without_an_index_or_with_one_of_another_name(tmp_path):
    save_tiny("wide heads", tmp_path, max_shard_size="60KB")
    before = reference.forward(loaded(tmp_path), PROMPT)
    index = tmp_path / "model.safetensors.index.json"
    index.rename(tmp_path / "weights.safetensors.index.json")
    assert torch.equal(reference.forward(loaded(tmp_path), PROMPT), before)
    (tmp_path / "weights.safetensors.index.json").unlink()
    assert torch.equal(reference.forward(loaded(tmp_path), PROMPT), before)
    shards = sorted(tmp_path.glob("*.safetensors"))
    shutil.copy(shards[0], tmp_path / "copy.safetensors")
    refused(tmp_path, "must not be in copy.safetensors too")
    (tmp_path / "copy.safetensors").unlink()
    shards[1].unlink()
    refused(tmp_path, f"<{len(shards) - 1} of {len(shards)} shards>", "all be there")


def test_weights_that_are_there_twice_count_once(copy):
    folder = copy("wide heads")
    before = reference.forward(loaded(folder), PROMPT)
    (folder / WHOLE).rename(folder / "weights.safetensors")
    save_file({"tok_embeddings.weight": torch.ones(3)}, folder / "consolidated.safetensors")
    assert torch.equal(reference.forward(loaded(folder), PROMPT), before)
    (folder / "weights.safetensors").unlink()
    refused(folder, "model.embed_tokens.weight", "Mistral's own releases")


def test_model_without_its_head_is_told(copy):
    folder = copy("wide heads")
    rewrite(
        folder,
        lambda t: {name.removeprefix("model."): tensor for name, tensor in t.items() if name != "lm_head.weight"},
    )
    refused(folder, "model.embed_tokens.weight", "without the LM head")


def test_whole_file_counts_before_an_index_as_in_transformers(copy):
    folder = copy("wide heads")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    check_same_logits(folder)


def test_adapter_is_named(copy):
    folder = copy("wide heads")
    (folder / WHOLE).rename(folder / "adapter_model.safetensors")
    refused(folder, "adapter_model.safetensors", "adapter")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 3, "group_size": 32}}, "bits is 3"),
        ({"quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "group_size is 64"),
    ],
)
def test_quantised_config_is_named(copy, config, named):
    folder = copy("wide heads")
    edit_json(folder / "config.json", **config)
    refused(folder, next(iter(config)), named, "quantised", "unquantised", error=ModelError)


@pytest.mark.parametrize(
    "name",
    [
        "w1.qweight",
        "w1.g_idx",
        "w1.weight_scale_inv",
        "w1.weight_packed",
        "w1.weight.absmax",
        "w1.weight.quant_state.bitsandbytes__nf4",
        "w1.SCB",
        "gate_up_proj_blocks",
        "k_scale",
    ],
)
def test_quantised_tensors_are_named_though_the_config_says_nothing(copy, name):
    folder = copy("wide heads")
    whole = f"model.layers.0.block_sparse_moe.experts.0.{name}"
    rewrite(folder, lambda t: {**t, whole: torch.ones(3, dtype=torch.uint8)})
    refused(folder, whole, "quantised", "unquantised")


def test_null_quantisation_is_none(copy):
    folder = copy("wide heads")
    edit_json(folder / "config.json", quantization_config={})
    loaded(folder)


@pytest.mark.parametrize("old", [True, False])
def test_dtype_by_either_name_and_no_generation_config(copy, old):
    folder = copy("wide heads")
    changes = {"torch_dtype": "bfloat16", "dtype": None} if old else {"dtype": "bfloat16"}
    edit_json(folder / "config.json", **changes)
    (folder / "generation_config.json").unlink()
    assert loaded(folder).arch.eos_token_ids == (2,)


def test_contradicting_rope_theta_is_said(copy):
    folder = copy("wide heads")
    edit_json(folder / "config.json", rope_theta=5e5)
    refused(folder, "rope_parameters: rope_theta", "500000", "10000", "remove", error=ModelError)
    edit_json(folder / "config.json", rope_theta=10_000)
    check_same_logits(folder)


def test_contradicting_rope_theta_of_dbrx_is_said(copy):
    """transformers 5 writes its default beside the section that it does not read."""
    folder = copy(DBRX)
    attention = json.loads((folder / "config.json").read_text())["attn_config"]
    edit_json(folder / "config.json", attn_config={**attention, "rope_theta": 5e5})
    refused(folder, "attn_config: rope_theta", "500000", "10000", error=ModelError)


def test_scaling_by_one_is_none(copy):
    folder = copy("wide heads")
    rope = {"rope_type": "linear", "factor": 1.0, "rope_theta": 10_000.0}
    edit_json(folder / "config.json", rope_parameters=rope)
    check_same_logits(folder)


def test_window_that_no_prompt_reaches(copy):
    folder = copy("wide heads")
    edit_json(folder / "config.json", sliding_window=len(PROMPT))
    check_same_logits(folder)
    assert {layer.window for layer in loaded(folder).arch.spec.layers} == {len(PROMPT)}
