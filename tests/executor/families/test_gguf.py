"""GGUF files, written by the gguf package, give the tokens of transformers with the weights that they mean."""

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import gguf
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file
from torch import Tensor

from executor.checkpoint import Checkpoint
from executor.families import family_for
from executor.gguf_file import GgufFile
from hrm.errors import ModelError
from hrm.model_spec import load_model
from hrm.model_spec.gguf import read_header
from tests.executor.families.test_quantised import GPT_OSS, MAX_TOKENS, NUM_PROMPTS, QWEN, greedy_tokens
from tests.executor.families.tiny import WEIGHTS, Tensors, Tiny, save
from tests.executor.runtime.support import CPU
from tests.executor.tiny_models import random_prompts

ARCHITECTURES: Final = {"qwen3moe": gguf.MODEL_ARCH.QWEN3MOE, "gpt-oss": gguf.MODEL_ARCH.GPT_OSS}
Kinds = dict[str, Type]  # of tensors whose names have such a part; of the others F32
CASES: Final[dict[str, tuple[str, Callable[[], Any], Kinds]]] = {
    "qwen in q8_0": ("qwen3moe", QWEN, {"": Type.Q8_0}),
    "qwen in q4_0 and q8_0": ("qwen3moe", QWEN, {"ffn_": Type.Q4_0, "attn_": Type.Q8_0, "output": Type.F16}),
    "gpt-oss in mxfp4": ("gpt-oss", GPT_OSS, {"_exps.weight": Type.MXFP4, "token_embd": Type.Q5_0}),
}


def merged(stored: Tensors) -> dict[str, list[Tensor]]:
    """Views of a checkpoint's tensors by the names that llama.cpp's converter looks up; experts are together."""
    views: dict[str, list[Tensor]] = {}
    for name, tensor in stored.items():
        if found := re.fullmatch(r"(.*\.experts\.)(gate_up|down)_proj(_bias)?", name):  # gpt-oss: transposed
            start, kind, bias = found.groups()
            parts = {"gate": tensor[..., 0::2], "up": tensor[..., 1::2]} if kind == "gate_up" else {"down": tensor}
            for part, rows in parts.items():
                views[f"{start}{part}_proj.{'bias' if bias else 'weight'}"] = [x if bias else x.T for x in rows]
        else:
            whole = re.sub(r"\.experts\.\d+\.", ".experts.", f"{name}.weight" if name.endswith("sinks") else name)
            views.setdefault(whole, []).append(tensor)
    return views


def write(path: Path, architecture: str, stored: Tensors, config: Any, kinds: Kinds) -> None:
    """Write a GGUF file, and leave in `stored` what its numbers mean."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(getattr(config, "num_local_experts", None) or config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", config.intermediate_size))
    writer.add_token_list([str(i) for i in range(config.vocab_size)])
    if architecture == "gpt-oss":
        writer.add_sliding_window(config.sliding_window)
        writer.add_expert_feed_forward_length(config.intermediate_size)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
        writer.add_rope_scaling_orig_ctx_len(config.rope_parameters["original_max_position_embeddings"])
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], config.num_hidden_layers)
    for name, views in merged(stored).items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        whole = torch.stack(views) if "experts" in name else views[0]
        fits = whole.ndim > 1 and "bias" not in theirs and "inp" not in theirs
        kind = next((kind for part, kind in kinds.items() if part in theirs and fits), Type.F32)
        blocks = quantize(whole.numpy(), kind)
        writer.add_tensor(theirs, blocks, raw_dtype=kind)
        meant = torch.from_numpy(dequantize(blocks, kind).copy()).view(whole.shape)
        for view, exact in zip(views, meant if "experts" in name else [meant], strict=True):
            view.copy_(exact)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module", params=CASES)
def tiny(request: Any, tmp_path_factory: Any) -> Tiny:
    architecture, make, kinds = CASES[request.param]
    folder = tmp_path_factory.mktemp("gguf")
    saved = save(make, folder)
    stored = load_file(folder / WEIGHTS)
    path = folder / "model.gguf"
    write(path, architecture, stored, saved.model.config, kinds)
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    return Tiny(type(saved.model).from_pretrained(folder).float().eval(), path)


def test_tokens_are_those_of_the_weights_that_are_meant(tiny: Tiny) -> None:
    with Checkpoint.open(tiny.folder) as checkpoint:
        family = family_for(checkpoint.config, checkpoint.config_path)
        arch = family.architecture(checkpoint.config, checkpoint.config_path)
        checkpoint.check(family.expected_tensors(arch, checkpoint.names))
    spec = load_model(str(tiny.folder))
    assert spec == load_model(str(tiny.folder.parent)).with_layers(spec.layers, name=spec.name)
    assert spec == arch.spec
    assert all(dict(layer.packed).keys() >= {"w13", "w2"} for layer in spec.layers)
    prompts = random_prompts(NUM_PROMPTS, vocab=tiny.vocab_size)
    expected = tiny.greedy(prompts, MAX_TOKENS)
    assert greedy_tokens(tiny, prompts, attention=CPU, resident=1) == expected


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q6_K, Type.Q2_K, Type.Q5_1, Type.BF16])
def test_other_types_are_read_as_numbers(tmp_path: Path, kind: Type) -> None:
    """Random blocks, with factors that are numbers."""
    rows, width = 8, 512
    size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    draw = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 60, (rows, width // size * num_bytes), generator=draw, dtype=torch.uint8)
    path = tmp_path / "model.gguf"
    stored = {"model.embed_tokens.weight": torch.zeros(4, 512), "model.norm.weight": torch.zeros(512)}
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_tensor("token_embd.weight", stored["model.embed_tokens.weight"].numpy())
    writer.add_tensor("blk.0.attn_q.weight", blocks.numpy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(path)
    file = GgufFile(path, header)
    out = torch.empty(rows, width)
    file.read_into("model.layers.0.self_attn.q_proj.weight", out, 0)
    some = torch.empty(3, width)
    file.read_into("model.layers.0.self_attn.q_proj.weight", some, 2)
    file.close()
    expected = torch.from_numpy(dequantize(blocks.numpy(), kind).copy())
    assert out.equal(expected)
    assert some.equal(expected[2:5])


def a_header(*, count: int = 1, architecture: str = "qwen3moe", kind: int = 0, offset: int = 0) -> bytes:
    """A file of one key and one tensor of four numbers."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    key = text("general.architecture") + struct.pack("<I", 8) + text(architecture)
    tensor = text("token_embd.weight") + struct.pack("<IQQIQ", 2, 2, 2, kind, offset)
    header = struct.pack("<4sIQQ", b"GGUF", 3, count, 1) + key + tensor
    return header + bytes(-len(header) % 32) + bytes(16)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a whole GGUF file"),
        (b"GGML" + bytes(40), "must be a whole GGUF file"),
        (a_header()[:60], "must be a whole GGUF file"),
        (a_header(count=2), "must be a whole GGUF file"),
        (a_header(count=1 << 60), "must be a whole GGUF file"),
        (a_header(offset=1 << 40), "ends behind the file"),
        (a_header(kind=16), "token_embd.weight is <type 16>: must be one of F32"),
        (a_header(kind=12), "must be a whole GGUF file"),
        (a_header(architecture="llama"), "general.architecture is llama: must be one of qwen3moe, gpt-oss"),
        (a_header(), "qwen3moe.embedding_length is <missing>"),
    ],
)
def test_files_that_are_not_read_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        load_model(str(path))
    assert message in str(caught.value).replace("'", "")
    assert str(path) in str(caught.value)
