import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from executor.checkpoint import Checkpoint
from executor.errors import CheckpointError
from executor.families import family_for
from hrm.errors import HrmError
from tests.executor.tiny_models import edit_json, save_tiny

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def single(tiny_folders):
    return tiny_folders["wide heads"]


@pytest.fixture
def copy(single, tmp_path):
    return shutil.copytree(single, tmp_path / "model")


@pytest.fixture(scope="module")
def sharded_source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    return save_tiny("wide heads", folder, max_shard_size="100KB")


@pytest.fixture
def sharded(sharded_source, tmp_path):
    return shutil.copytree(sharded_source, tmp_path / "sharded")


def open_and_check(folder):
    with Checkpoint.open(folder) as checkpoint:
        family = family_for(checkpoint.config, checkpoint.config_path)
        arch = family.architecture(checkpoint.config, checkpoint.config_path)
        checkpoint.check(family.expected_tensors(arch))


def refused(folder, *parts):
    """Opening raises one line that holds all of `parts` and has the shape of an HrmError."""
    with pytest.raises(HrmError) as caught:
        open_and_check(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in (*parts, caught.value.rule, caught.value.remedy):
        assert part in message
    return caught.value


def change_tensor(folder, name, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    save_file(tensors, path)


def test_sharded_and_single_files_hold_the_same(single, sharded):
    assert len(list(sharded.glob("*.safetensors"))) > 2
    open_and_check(sharded)
    stored = load_file(single / "model.safetensors")
    with Checkpoint.open(sharded) as pieces, Checkpoint.open(single) as whole:
        for name, tensor in stored.items():
            assert torch.equal(pieces.tensor(name), tensor)
            assert torch.equal(whole.tensor(name), tensor)


def test_reads_rows_and_converts(single):
    with Checkpoint.open(single) as checkpoint:
        embedding = checkpoint.tensor("model.embed_tokens.weight")
        out = torch.empty(3, 32, dtype=torch.bfloat16)
        checkpoint.read_into("model.embed_tokens.weight", out, first_row=5)
    assert torch.equal(out, embedding[5:8].to(torch.bfloat16))


def test_tensors_outlive_the_checkpoint(single):
    with Checkpoint.open(single) as checkpoint:
        norm = checkpoint.tensor(NORM)
    assert (norm > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_welcome(copy, dtype):
    change_tensor(copy, NORM, lambda tensor: tensor.to(dtype))
    open_and_check(copy)


def test_generation_config_overrides_end_of_sequence(copy):
    edit_json(copy / "generation_config.json", eos_token_id=[2, 7], bos_token_id=3)
    with Checkpoint.open(copy) as checkpoint:
        assert checkpoint.config["eos_token_id"] == [2, 7]
        assert checkpoint.config["bos_token_id"] == 3
    (copy / "generation_config.json").unlink()
    with Checkpoint.open(copy) as checkpoint:
        assert checkpoint.config["eos_token_id"] == 2


def test_no_folder(tmp_path):
    error = refused(tmp_path / "absent", "--model", "absent")
    assert isinstance(error, CheckpointError)


def test_missing_config(copy):
    (copy / "config.json").unlink()
    refused(copy, "config.json", "No such file")


@pytest.mark.parametrize("text", ["{", "[1]", '"text"', "\xff\xfe"])
def test_config_that_is_no_json_object(copy, text):
    (copy / "config.json").write_text(text, encoding="latin-1")
    refused(copy, "config.json", "JSON")


def test_unknown_model_type(copy):
    edit_json(copy / "config.json", model_type="llama")
    refused(copy, "config.json: model_type", "'llama'", "mixtral, dbrx")


def test_missing_tensor(copy):
    change_tensor(copy, NORM, lambda _: None)
    refused(copy, NORM, "<missing>")


def test_wrong_shape(copy):
    change_tensor(copy, NORM, lambda tensor: tensor[:-1])
    refused(copy, "model.safetensors", NORM, "(31,)", "(32,)")


def test_config_of_another_model(copy):
    edit_json(copy / "config.json", intermediate_size=41)
    refused(copy, "w1.weight", "(40, 32)", "(41, 32)")


def test_wrong_dtype(copy):
    change_tensor(copy, NORM, lambda tensor: tensor.to(torch.int8))
    refused(copy, NORM, "I8", "bfloat16")


def test_tensor_that_would_be_ignored(copy):
    change_tensor(copy, NORM, lambda tensor: tensor)
    path = copy / "model.safetensors"
    bias = "model.layers.0.self_attn.q_proj.bias"
    inv_freq = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors = load_file(path)
    save_file({**tensors, inv_freq: torch.ones(3)}, path)
    open_and_check(copy)
    save_file({**tensors, bias: torch.ones(3)}, path)
    refused(copy, bias, "mixtral")


@pytest.mark.parametrize("kept", [0, 5, 1000, -1])
def test_truncated_file(copy, kept):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(copy, "model.safetensors", "bytes", "truncated")


def test_truncated_shard_is_named(sharded):
    path = sorted(sharded.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-10])
    refused(sharded, path.name, "truncated")


@pytest.mark.parametrize("new_format", [True, False])
def test_pickle_in_place_of_safetensors(copy, new_format):
    path = copy / "model.safetensors"
    if new_format:
        torch.save({"a": torch.ones(2)}, path)
    else:
        path.write_bytes(pickle.dumps({"a": 1}, protocol=4))
    refused(copy, "model.safetensors", "<a pickle>", "safetensors")


def test_only_pickled_weights(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    refused(copy, "pytorch_model.bin", "must be safetensors")


def test_no_weights(copy):
    (copy / "model.safetensors").unlink()
    refused(copy, "weights", "<missing>", "model.safetensors.index.json")


def test_missing_shard(sharded):
    path = min(sharded.glob("*.safetensors"))
    path.unlink()
    refused(sharded, path.name, "readable")


def test_a_pipe_in_place_of_weights_is_not_waited_for(sharded):
    path = min(sharded.glob("*.safetensors"))
    path.unlink()
    os.mkfifo(path)
    refused(sharded, path.name, "<a pipe>", "must be a readable safetensors file")


def test_index_naming_a_tensor_that_its_file_lacks(sharded):
    index = sharded / "model.safetensors.index.json"
    files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    other = next(file for file in files.values() if file != files[NORM])
    edit_json(index, weight_map={**files, NORM: other})
    refused(sharded, NORM, other, "index.json")


@pytest.mark.parametrize(
    "file",
    [
        "../other/model.safetensors",
        "/etc/model.safetensors",
        "a/../../b.safetensors",
        "..\\b.safetensors",
        "weights.bin",
        3,
    ],
)
def test_index_that_leaves_the_folder(sharded, file):
    index = sharded / "model.safetensors.index.json"
    files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    edit_json(index, weight_map={**files, NORM: file})
    refused(sharded, f"weight_map: {NORM}", repr(file), "inside the checkpoint's folder")


@pytest.mark.parametrize("weight_map", [None, {}, []])
def test_index_without_a_map(sharded, weight_map):
    edit_json(sharded / "model.safetensors.index.json", weight_map=weight_map)
    refused(sharded, "weight_map", "must map names")
