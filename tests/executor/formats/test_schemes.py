"""Packed matrices are read from files as the tools that write them read them, or are refused by name."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from executor.checkpoint import Checkpoint, Expected
from executor.errors import CheckpointError
from executor.formats import Cut, packed_in
from hrm.errors import ModelError
from hrm.formats import PackedFormat, packed_format
from tests.executor.formats.published import PUBLISHED, Parts, mxfp4_stack

ROWS, WIDTH = 48, 96
MODULE = "model.layers.0.self_attn.o_proj"
EXPERTS = "model.layers.0.mlp.experts.down_proj"


def matrix(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def checkpoint_of(folder: Path, tensors: Parts, config: Any) -> Checkpoint:
    save_file({name: part.contiguous() for name, part in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "quantization_config": config}))
    return Checkpoint.open(folder)


def published(folder: Path, name: str) -> tuple[Checkpoint, PackedFormat, Tensor]:
    """A checkpoint of a matrix that is published so, its format, and the numbers that tools read of it."""
    how = PUBLISHED[name]
    parts, expected = how.pack(matrix(ROWS, WIDTH))
    form = packed_format(how.format)
    assert form is not None
    return checkpoint_of(folder, {MODULE + end: part for end, part in parts.items()}, how.config), form, expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_matrices_are_read_as_the_tools_read_them(tmp_path: Path, name: str) -> None:
    checkpoint, form, expected = published(tmp_path, name)
    with checkpoint:
        checkpoint.check({f"{MODULE}.weight": Expected((ROWS, WIDTH))})
        packed = packed_in(form, ROWS, WIDTH, torch.full((form.bytes_of(ROWS, WIDTH),), 0xA5, dtype=torch.uint8))
        checkpoint.read_packed_into(f"{MODULE}.weight", packed)
        plain = torch.empty(ROWS, WIDTH)
        checkpoint.read_into(f"{MODULE}.weight", plain)
    ours = packed.dequantised(torch.empty(ROWS, WIDTH))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)
    assert plain.equal(ours)
    assert (ours - matrix(ROWS, WIDTH)).abs().mean() < 0.2  # what was packed, about


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_part_of_a_matrix_is_read_on_its_own(tmp_path: Path, name: str) -> None:
    """Packed, if it has whole groups, though it may begin within the words of a file; and as numbers in any case."""
    checkpoint, form, _ = published(tmp_path, name)
    rows = slice(20, 43) if form.rows == 1 else slice(form.rows, ROWS)
    columns = slice(0, WIDTH) if form.ordered else slice(32, 64) if form.columns else slice(6, 52)
    with checkpoint:
        whole = torch.empty(ROWS, WIDTH)
        checkpoint.read_into(f"{MODULE}.weight", whole)
        expected = whole[rows, columns]
        height, breadth = expected.shape
        room = torch.full((form.bytes_of(height, breadth),), 0xA5, dtype=torch.uint8)
        packed = packed_in(form, height, breadth, room)
        checkpoint.read_packed_into(f"{MODULE}.weight", packed, 0, Cut((ROWS, WIDTH), rows.start, columns.start))
        assert packed.dequantised(torch.empty(expected.shape)).equal(expected)
        plain = torch.empty(30, 41)
        checkpoint.read_into(f"{MODULE}.weight", plain, 0, Cut((ROWS, WIDTH), 11, 37))
        assert plain.equal(whole[11:41, 37:78])


@pytest.mark.parametrize("name", PUBLISHED)
def test_axes_of_one_element_make_no_difference(tmp_path: Path, name: str) -> None:
    """Of a matrix with one group in a row, of which a file has left them out."""
    how, (rows, width) = PUBLISHED[name], (ROWS, 32)
    parts, expected = how.pack(matrix(rows, width))
    tensors = {MODULE + end: part.squeeze() for end, part in parts.items()}
    with checkpoint_of(tmp_path, tensors, how.config) as checkpoint:
        checkpoint.check({f"{MODULE}.weight": Expected((rows, width))})
        plain = torch.empty(rows, width)
        checkpoint.read_into(f"{MODULE}.weight", plain)
    torch.testing.assert_close(plain, expected, rtol=1e-6, atol=1e-7)


def test_a_column_of_words_may_be_stored_as_one_vector(tmp_path: Path) -> None:
    """Each row fills a part of its word, so that words are not read to where codes stay."""
    weights = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 4}
    groups = {"all": {"targets": ["Linear"], "weights": weights}}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    words = torch.arange(8, dtype=torch.int32) * 0x1111
    tensors = {f"{MODULE}.weight_packed": words, f"{MODULE}.weight_scale": torch.ones(8)}
    with checkpoint_of(tmp_path, tensors, config) as checkpoint:
        checkpoint.check({f"{MODULE}.weight": Expected((8, 4))})
        plain = torch.empty(8, 4)
        checkpoint.read_into(f"{MODULE}.weight", plain)
    assert plain.equal(torch.arange(8.0)[:, None].expand(8, 4) - 8)


def test_a_stack_of_experts_is_read_as_transformers_reads_it(tmp_path: Path, monkeypatch: Any) -> None:
    experts, width = 3, 64
    parts, expected = mxfp4_stack(torch.empty(experts, width, ROWS))
    form = packed_format("mxfp4")
    assert form is not None
    tensors = {EXPERTS + end: part for end, part in parts.items()}
    with checkpoint_of(tmp_path, tensors, {"quant_method": "mxfp4"}) as checkpoint:
        checkpoint.check({EXPERTS: Expected((experts, width, ROWS))})
        counts: list[int] = []
        preadv = os.preadv
        monkeypatch.setattr(os, "preadv", lambda *args: counts.append(preadv(*args)) or counts[-1])
        for expert in range(experts):
            packed = packed_in(form, ROWS, width, torch.empty(form.bytes_of(ROWS, width), dtype=torch.uint8))
            checkpoint.read_packed_into(EXPERTS, packed, expert * width)
            assert packed.dequantised(torch.empty(ROWS, width)).equal(expected[expert].T)
            assert sum(counts) == (expert + 1) * packed.nbytes, "each byte once"
        some = packed_in(form, 7, 32, torch.empty(form.bytes_of(7, 32), dtype=torch.uint8))
        checkpoint.read_packed_into(EXPERTS, some, 2 * width, Cut((ROWS, width), 5, 32))
        assert some.dequantised(torch.empty(7, 32)).equal(expected[2].T[5:12, 32:])
        for expert in range(experts):
            plain = torch.empty(ROWS, width)
            checkpoint.read_into(EXPERTS, plain.T, expert * width)
            assert plain.equal(expected[expert].T)


# -- what is refused --------------------------------------------------------------------------------


def nan_at_first(part: Tensor) -> Tensor:
    """The same bytes, but for a first number that is none in any format of scales."""
    changed = part.clone().reshape(-1)
    changed.view(torch.uint8).view(-1)[: part.itemsize] = 0xFF
    return changed.reshape(part.shape)


BROKEN = [
    ("fp8 in blocks", ".weight_scale_inv", nan_at_first, "<1 scales that are no numbers>"),
    ("fp8, one scale", ".weight_scale", nan_at_first, "<1 scales that are no numbers>"),
    ("int4", ".weight_scale", nan_at_first, "<1 scales that are no numbers>"),
    ("nvfp4", ".weight_scale", nan_at_first, "<1 scales that are no numbers>"),
    ("nvfp4", ".weight_global_scale", torch.zeros_like, "must be finite"),
    ("mxfp4", ".weight_scale", nan_at_first, "<1 scales that are no numbers>"),
    ("awq", ".scales", nan_at_first, "<1 scales that are no numbers>"),
    ("int4", ".weight_scale", lambda part: part[:, :-1], f"<shape ({ROWS}, 2)>: must have the shape ({ROWS}, 3)"),
    ("fp8 in blocks", ".weight_scale_inv", lambda part: part.T, "must have the shape (3, 6)"),
    ("int4", ".weight_packed", lambda part: part[:, :-1], f"must have the shape ({ROWS}, 12)"),
    ("nvfp4", ".weight_packed", lambda part: part[:-1], f"must have the shape ({ROWS}, 48)"),
    ("gptq", ".qzeros", lambda part: part[:-1], "must have the shape (3, 6)"),
    ("awq", ".qweight", lambda part: part.float(), "<dtype F32>: must be I32"),
    ("int8", ".weight", lambda part: part.int(), "<dtype I32>: must be I8"),
    ("gptq in order", ".g_idx", lambda part: part + 1, "<1 to 3>: must be numbers of 3 groups"),
    ("gptq", ".g_idx", lambda part: part.flip(0), "set desc_act to true"),
    ("gptq, symmetric", ".qzeros", lambda part: part + 1, "set sym to false"),
    ("gptq", ".scales", lambda part: part.float() * 1.0001, "set its torch_dtype"),
    ("int4", ".weight_shape", lambda part: part + 1, f"must be [{ROWS}, {WIDTH}]"),
    ("int4", ".weight_packed", None, "<missing"),
    ("gptq", ".qzeros", None, "<missing"),
]


@pytest.mark.parametrize(("name", "part", "change", "message"), BROKEN)
def test_broken_parts_are_named(tmp_path: Path, name: str, part: str, change: Any, message: str) -> None:
    how = PUBLISHED[name]
    parts, _ = how.pack(matrix(ROWS, WIDTH))
    parts = {end: tensor for end, tensor in parts.items() if end != part or change is not None}
    if change is not None:
        parts[part] = change(parts[part])

    def checked_and_read() -> None:
        with checkpoint_of(tmp_path, {MODULE + end: tensor for end, tensor in parts.items()}, how.config) as checkpoint:
            checkpoint.check({f"{MODULE}.weight": Expected((ROWS, WIDTH))})
            checkpoint.read_into(f"{MODULE}.weight", torch.empty(ROWS, WIDTH))

    with pytest.raises(CheckpointError) as caught:
        checked_and_read()
    assert f"model.safetensors: {MODULE}{part} is " in str(caught.value) or change is None
    assert MODULE + part in str(caught.value)
    assert message in str(caught.value)
    assert caught.value.remedy


def test_a_plain_matrix_in_place_of_a_packed_one_is_named(tmp_path: Path) -> None:
    form = packed_format("int4-g32")
    assert form is not None
    packed = packed_in(form, ROWS, WIDTH, torch.empty(form.bytes_of(ROWS, WIDTH), dtype=torch.uint8))
    tensors = {f"{MODULE}.weight": matrix(ROWS, WIDTH)}
    with (
        checkpoint_of(tmp_path, tensors, PUBLISHED["int4"].config) as checkpoint,
        pytest.raises(CheckpointError, match=r"o_proj.weight is <plain>: must be stored as int4-g32"),
    ):
        checkpoint.read_packed_into(f"{MODULE}.weight", packed)


@pytest.mark.parametrize("bias", [0.0, 0.5])
def test_biases_that_tools_add_are_noughts(tmp_path: Path, bias: float) -> None:
    how = PUBLISHED["gptq"]
    parts, _ = how.pack(matrix(ROWS, WIDTH))
    tensors = {MODULE + end: part for end, part in {**parts, ".bias": torch.full((ROWS,), bias)}.items()}
    with checkpoint_of(tmp_path, tensors, how.config) as checkpoint:
        expected = {f"{MODULE}.weight": Expected((ROWS, WIDTH))}
        if bias:
            with pytest.raises(CheckpointError, match="bias is <not used>"):
                checkpoint.check(expected)
        else:
            checkpoint.check(expected)


@pytest.mark.parametrize("outer", [True, False])
def test_modelopt_says_beside_the_config_how_weights_are_quantised(tmp_path: Path, *, outer: bool) -> None:
    how = PUBLISHED["modelopt fp8"]
    parts, _ = how.pack(matrix(ROWS, WIDTH))
    save_file({MODULE + end: part for end, part in parts.items()}, tmp_path / "model.safetensors")
    config: Any = {"model_type": "qwen3_moe"}
    (tmp_path / "config.json").write_text(json.dumps(config if outer else {"text_config": config}))
    told = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "x"}, "quantization": told}))
    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.check({f"{MODULE}.weight": Expected((ROWS, WIDTH))})
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "INT4_AWQ"}}))
    with Checkpoint.open(tmp_path) as checkpoint, pytest.raises(ModelError, match="quant_algo is 'INT4_AWQ'"):
        checkpoint.check({f"{MODULE}.weight": Expected((ROWS, WIDTH))})
