"""Packed checkpoints as others read them: the library that defines the form, and transformers."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from executor.checkpoint import Checkpoint
from executor.cli import cli
from executor.errors import CheckpointError
from executor.families import family_for
from executor.formats.encode import encode
from executor.quantise import QuantiseOptions, Report, What, quantise
from hrm.cli.program import run_program
from hrm.errors import HrmError, ModelError
from hrm.formats import packed_format
from tests.executor.families.grouped import qwen3_vl, transposed_experts
from tests.executor.families.tiny import Tiny, causal, save
from tests.executor.families.windowed import WINDOWED
from tests.executor.tiny_models import DBRX, edit_json, save_tiny

WEIGHTS: Final = "model.safetensors"
TOKENS: Final = torch.arange(3, 43).view(1, -1) % 90
SMALL: Final[dict[str, Any]] = {"hidden_size": 64, "num_hidden_layers": 2, "num_experts_per_tok": 2, "head_dim": 16}
QWEN: Final = causal("qwen3_moe", moe_intermediate_size=32, num_experts=4, **SMALL)
FORMATS: Final = ("int4-g32", "int8", "fp8", "fp8-b16", "mxfp4")


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Tiny:
    """A model as it is published, each expert's matrices on their own."""
    return save(QWEN, tmp_path_factory.mktemp("split"))


@pytest.fixture(scope="module")
def fused(split, tmp_path_factory) -> Tiny:
    """The same with all experts of a layer in two tensors, in two files."""
    folder = tmp_path_factory.mktemp("fused")
    split.model.save_pretrained(folder, save_original_format=False, max_shard_size="150KB")
    return Tiny(split.model, folder)


def packed(model: Path, out: Path, form: str, what: What = What.EXPERTS) -> Report:
    return quantise(QuantiseOptions(model=model, out=out, format=form, what=what))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def rounded(weights: Tensor, form: str) -> Tensor:
    """What a matrix becomes, whose scales are float32 as it is."""
    made = packed_format(f"{form}-f32" if form.startswith("int4") else form)
    assert made is not None
    return encode(weights, made).weights()


def is_packed(name: str, what: What) -> bool:
    linear = ("experts", "q_proj", "k_proj", "v_proj", "o_proj")
    return any(f".{part}." in name for part in (linear if what is What.LINEAR else linear[:1]))


@pytest.mark.parametrize("what", What)
@pytest.mark.parametrize("form", ["int4-g32", "int8", "fp8", "mxfp4"])
def test_the_library_unpacks_what_was_packed(split, form, what, tmp_path) -> None:
    """Of compressed-tensors, by the config that was written, module by module; all else is as it was."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    packed(split.folder, tmp_path / "out", form, what)
    before, after = tensors_of(split.folder), tensors_of(tmp_path / "out")
    config = QuantizationConfig.model_validate(config_of(tmp_path / "out")["quantization_config"])
    scheme: Any = config.config_groups["group_0"]
    compressor: Any = BaseCompressor.get_value_from_registry(config.format)
    for name, weights in before.items():
        parts = {part.rpartition(".")[2]: after.pop(part) for part in list(after) if part.startswith(name)}
        if not is_packed(name, what):
            assert parts["weight"].equal(weights)
            assert name.removesuffix(".weight") in (config.ignore or []) or weights.ndim == 1
            continue
        unpacked = compressor.decompress(parts, scheme)["weight"].float()
        torch.testing.assert_close(unpacked, rounded(weights, form), rtol=1e-6, atol=0)
    assert not after


def with_rounded_weights(model: Any, form: str) -> Any:
    """The model with each expert's matrices, and those of attention, as they are packed."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if not is_packed(f"{name}.", What.LINEAR):
                continue
            stack = tensor if tensor.ndim == 3 else tensor[None]
            for matrix in stack:
                for part in matrix.chunk(2) if "gate_up" in name else (matrix,):
                    part.copy_(rounded(part, form))
    return model


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    return model(input_ids=TOKENS).logits.float()


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("stored", ["split", "fused"])
def test_transformers_reads_what_was_written(stored, form, request, tmp_path) -> None:
    """And computes what it does with the rounded weights in place of the original ones."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config

    tiny = request.getfixturevalue(stored)
    packed(tiny.folder, tmp_path / "out", form, What.LINEAR)
    how = FineGrainedFP8Config if form.startswith("fp8-b") else CompressedTensorsConfig
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, quantization_config=how(dequantize=True)
    )
    expected = with_rounded_weights(AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32), form)
    torch.testing.assert_close(logits(read.float()), logits(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("what", What)
@pytest.mark.parametrize("form", [*FORMATS, "int4-g48"])
def test_the_executor_reads_what_was_written(split, fused, form, what, tmp_path) -> None:
    """Groups that do not divide rows included, which others do not read; split experts by their own names."""
    packed(fused.folder, tmp_path / "out", form, what)
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        family = family_for(checkpoint.config, checkpoint.config_path)
        arch = family.architecture(checkpoint.config, checkpoint.config_path)
        checkpoint.check(family.expected_tensors(arch, checkpoint.names))
        for name, weights in tensors_of(split.folder).items():
            read = torch.empty_like(weights)
            checkpoint.read_into(name, read)
            assert read.equal(rounded(weights, form) if is_packed(name, what) else weights), name


def test_names_of_mixtral_are_the_published_ones_whatever_transformers_calls_them(tmp_path) -> None:
    make = causal("mixtral", **{**SMALL, "intermediate_size": 32, "num_local_experts": 3})
    tiny = save(make, tmp_path / "split")
    tiny.model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert "model.layers.0.mlp.experts.down_proj" in tensors_of(tmp_path / "fused")
    for stored in ("split", "fused"):
        packed(tmp_path / stored, tmp_path / f"{stored}-out", "int8", What.LINEAR)
    split, fused = (tensors_of(tmp_path / f"{stored}-out") for stored in ("split", "fused"))
    assert split.keys() == fused.keys() >= {"model.layers.1.block_sparse_moe.experts.2.w3.weight_packed"}
    assert all(tensor.equal(fused[name]) for name, tensor in split.items())


def test_gpt_oss_is_packed_as_it_is_published(tmp_path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import Mxfp4Config

    tiny = save(causal("gpt_oss", intermediate_size=96, num_local_experts=4, **SMALL), tmp_path / "plain")
    packed(tiny.folder, tmp_path / "out", "mxfp4")
    after = tensors_of(tmp_path / "out")
    assert after["model.layers.0.mlp.experts.gate_up_proj_blocks"].shape == (4, 192, 2, 16)
    assert after["model.layers.0.mlp.experts.down_proj_scales"].shape == (4, 64, 3)
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    for name, tensor in read.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):
            plain = tiny.model.get_parameter(name)
            for made, weights in zip(tensor, plain, strict=True):
                assert made.float().T.equal(rounded(weights.T.contiguous(), "mxfp4"))


def test_what_belongs_to_a_model_comes_along(fused, tmp_path) -> None:
    model = shutil.copytree(fused.folder, tmp_path / "model")
    (tmp_path / "elsewhere.json").write_text("{}")
    (model / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "training.log").write_text("nobody needs it")
    report = packed(model, tmp_path / "out", "int4-g16")
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert there == {path.name for path in model.iterdir()} - {"training.log"}
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    after = tensors_of(tmp_path / "out")
    assert index["weight_map"].keys() == after.keys()
    assert index["metadata"]["total_size"] == report.bytes_after == sum(tensor.nbytes for tensor in after.values())
    before = config_of(model)
    assert {**before, "quantization_config": config_of(tmp_path / "out")["quantization_config"]} == config_of(
        tmp_path / "out"
    )


def test_errors_are_those_of_the_weights(split, tmp_path) -> None:
    report = packed(split.folder, tmp_path / "out", "int4-g32")
    before, after = tensors_of(split.folder), 0.0
    experts = {name: tensor for name, tensor in before.items() if ".layers.1." in name and ".experts." in name}
    for weights in experts.values():
        after += (rounded(weights, "int4-g32") - weights).square().sum().item()
    whole = sum(weights.square().sum().item() for weights in experts.values())
    loss = report.losses[1, True]
    assert loss.matrices == len(experts) == 12
    assert loss.relative_error == pytest.approx((after / whole) ** 0.5, rel=1e-5)
    assert loss.bits == pytest.approx(4 + 32 / 32)


def test_the_text_part_of_a_multimodal_model_keeps_its_names(split, tmp_path) -> None:
    model = shutil.copytree(split.folder, tmp_path / "model")
    text = {name.replace("model.", "model.language_model.", 1): value for name, value in tensors_of(model).items()}
    vision = {"model.visual.patch_embed.proj.weight": torch.ones(4, 8)}
    save_file({**text, **vision}, model / WEIGHTS, metadata={"format": "pt"})
    packed(model, tmp_path / "out", "int8")
    after = tensors_of(tmp_path / "out")
    assert "model.language_model.layers.0.mlp.experts.0.up_proj.weight_packed" in after
    ignored = config_of(tmp_path / "out")["quantization_config"]["ignore"]
    assert {"model.visual.patch_embed.proj", "model.language_model.layers.0.mlp.gate", "lm_head"} <= {*ignored}


def test_stacks_that_are_stored_on_their_side_are_parted(tmp_path) -> None:
    tiny = save(qwen3_vl, tmp_path / "model", transposed_experts)
    packed(tiny.folder, tmp_path / "out", "int8")
    after, prefix = tensors_of(tmp_path / "out"), "model.language_model.layers.0.mlp.experts"
    stack = tensors_of(tiny.folder)[f"{prefix}.gate_up_proj"]
    gate, up = stack[1].T.contiguous().chunk(2)
    for name, weights in (("gate_proj", gate), ("up_proj", up)):
        made = packed_format("int8")
        assert made is not None
        codes = encode(weights, made).codes ^ 0x80
        assert after[f"{prefix}.1.{name}.weight_packed"].view(torch.uint8).equal(codes)


def test_llama_4_is_packed_as_transformers_takes_it_apart(tmp_path) -> None:
    """Which has all experts of a layer in one tensor, on its side, but packed ones on their own."""
    from transformers import AutoModelForCausalLM

    tiny = save(WINDOWED["llama4_text"], tmp_path / "model")
    packed(tiny.folder, tmp_path / "out", "int8")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in tiny.model.named_parameters():
            for matrix in tensor if ".experts." in name else ():
                for part in matrix.T.chunk(2) if "gate_up" in name else (matrix.T,):
                    part.copy_(rounded(part.contiguous(), "int8"))
    torch.testing.assert_close(logits(read), logits(tiny.model), rtol=1e-4, atol=1e-4)


def test_a_tensor_that_two_files_have_is_taken_from_the_one_that_counts(fused, tmp_path) -> None:
    model = shutil.copytree(fused.folder, tmp_path / "model")
    index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.1.mlp.experts.down_proj"
    other = next(model / file for file in set(index.values()) if file != index[name])
    save_file({**load_file(other), name: torch.zeros(1)}, other, metadata={"format": "pt"})
    for folder in (fused.folder, model):
        packed(folder, tmp_path / f"{folder.name}-out", "int8")
    before, after = (tensors_of(tmp_path / f"{folder.name}-out") for folder in (fused.folder, model))
    assert before.keys() == after.keys()
    assert all(tensor.equal(after[name]) for name, tensor in before.items())


# -- what is refused, and what goes wrong -----------------------------------------------------------


def refused(model: Path, out: Path, form: str, *parts: str, error: type[HrmError] = CheckpointError) -> None:
    """With what is wrong and how to go on in one line, and nothing left beside the folder."""
    before = sorted(out.parent.iterdir()) if out.parent.exists() else []
    with pytest.raises(error) as caught:
        packed(model, out, form)
    for part in (*parts, caught.value.remedy):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert before == (sorted(out.parent.iterdir()) if out.parent.exists() else [])


@pytest.mark.parametrize(
    "form", ["int3", "int4", "int4-g0", "int8-g32-f16", "nvfp4", "int4-g128-z", "fp8-g32", "int4-g3", "fp8-b8", ""]
)
def test_other_formats_are_refused_with_those_that_there_are(split, form, tmp_path) -> None:
    refused(split.folder, tmp_path / "out", form, "--format", "int4-gN", error=ModelError)


def test_formats_that_nobody_publishes_of_a_model_are_refused(tmp_path) -> None:
    dbrx = save_tiny(DBRX, tmp_path / "dbrx")
    refused(dbrx, tmp_path / "out", "int8", "dbrx", "in one tensor", error=ModelError)
    tiny = save(causal("gpt_oss", intermediate_size=32, num_local_experts=4, **SMALL), tmp_path / "gpt-oss")
    refused(tiny.folder, tmp_path / "out", "int4-g32", "int4-g32", "mxfp4", error=ModelError)
    with pytest.raises(ModelError, match="--what"):
        packed(tiny.folder, tmp_path / "out", "mxfp4", What.LINEAR)


def test_groups_that_would_cross_what_is_joined_to_be_run_are_refused(split, tmp_path) -> None:
    """Gate and up projection have 32 rows each, and lie in one matrix."""
    refused(split.folder, tmp_path / "out", "fp8-b64", "experts of layer 0", "32 + 32 rows of 64", "smaller groups")


def test_what_is_quantised_already_is_refused(split, tmp_path) -> None:
    model = shutil.copytree(split.folder, tmp_path / "model")
    edit_json(model / "config.json", quantization_config={"quant_method": "fp8"})
    refused(model, tmp_path / "out", "int8", "quantization_config", "already", error=ModelError)


def test_weights_that_are_no_numbers_are_named(split, tmp_path) -> None:
    model, name = shutil.copytree(split.folder, tmp_path / "model"), "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors = tensors_of(model)
    tensors[name][5, 7] = torch.nan
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    refused(model, tmp_path / "out", "int8", name, WEIGHTS, "NaN")


def full(path: Path) -> None:
    path.mkdir()
    (path / "mine").write_text("of somebody")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (full, "not empty"),
        (lambda path: path.write_text("a file"), "a file"),
        (lambda path: path.symlink_to(path.parent), "a link to"),
        (lambda path: path.symlink_to(path / "nowhere"), "a link"),
    ],
)
def test_what_is_there_is_not_touched(split, make: Callable[[Path], object], told, tmp_path) -> None:
    make(tmp_path / "out")
    refused(split.folder, tmp_path / "out", "int8", "--out", told)


def test_an_empty_folder_is_filled_and_one_without_a_parent_refused(split, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    packed(split.folder, tmp_path / "out", "int8")
    assert config_of(tmp_path / "out")
    refused(split.folder, tmp_path / "none" / "out", "int8", "No such file")


def test_a_disk_without_room_is_told_before_the_work(split, tmp_path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused(split.folder, tmp_path / "out", "int8", "1.00 kB free", "room")


def test_room_is_taken_before_the_work(split, tmp_path, monkeypatch) -> None:
    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fails)
    refused(split.folder, tmp_path / "out", "int8", "--out", "No space left on device")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_half_made_is_left(split, error, tmp_path, monkeypatch, capsys) -> None:
    writes, write = [0], os.pwrite

    def fails(*args: Any) -> int:
        writes[0] += 1
        if writes[0] == 20:
            raise error
        return write(*args)

    monkeypatch.setattr(os, "pwrite", fails)
    if isinstance(error, OSError):
        refused(split.folder, tmp_path / "out", "int8", "--out", "No space left on device")
        return
    arguments = ["quantise", "--model", str(split.folder), "--format", "int8", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        run_program(cli, "executor", arguments)
    assert ended.value.code == 130
    assert "nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# -- the command line -------------------------------------------------------------------------------


def test_the_command_prints_what_was_lost(split, tmp_path) -> None:
    arguments = ["quantise", "--model", str(split.folder), "--format", "int4-g32"]
    text = CliRunner().invoke(cli, [*arguments, "--out", str(tmp_path / "a")], catch_exceptions=False).stdout
    told = CliRunner().invoke(cli, [*arguments, "--out", str(tmp_path / "b"), "--json"], catch_exceptions=False).stdout
    content = json.loads(told)
    assert [(row["layer"], row["experts"], row["matrices"]) for row in content["layers"]] == [
        (0, True, 12),
        (1, True, 12),
    ]
    assert f"{content['layers'][1]['relative_error']:.2%}" in text
    assert "compressed-tensors" in text
    assert tensors_of(tmp_path / "a").keys() == tensors_of(tmp_path / "b").keys()


def test_groups_that_others_cannot_read_are_said(split, tmp_path) -> None:
    report = packed(split.folder, tmp_path / "out", "int4-g48")
    assert "groups of 48" in report.obstacle
