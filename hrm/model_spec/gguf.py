"""GGUF files: what their headers say of a model, in the words of a config.json, and where their tensors lie.

A file is metadata, a table of tensors and their blocks of numbers; the format is llama.cpp's. Tensors
have here the names that transformers has for them, each expert's its own.
"""

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from hrm.errors import ModelError
from hrm.files import open_regular

SUFFIX: Final = ".gguf"
METHOD: Final = "gguf"  # what a config made of such a file has as its method of quantisation
MOST_TENSORS: Final = 10**6
MOST_ITEMS: Final = 10**7
MOST_EXPERTS: Final = 10**4
MOST_SHOWN: Final = 1024  # items of an array that is kept
MOST_CHARACTERS: Final = 1 << 24
DOWNLOAD_AGAIN: Final = "download the file again"


class BlockType(NamedTuple):
    """How a type of tensor has its numbers: so many in a block of so many bytes; in a format of ours, if it is one."""

    name: str
    size: int
    num_bytes: int
    format: str = ""


TYPES: Final[Mapping[int, BlockType]] = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    30: BlockType("BF16", 1, 2),
    2: BlockType("Q4_0", 32, 18, "int4-g32-f16"),
    8: BlockType("Q8_0", 32, 34, "int8-g32-f16"),
    39: BlockType("MXFP4", 32, 17, "mxfp4"),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
}


class GgufTensor(NamedTuple):
    """A tensor, or that of one expert: its type, its sizes, and where it begins in the file."""

    type: BlockType
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        """Its bytes."""
        return prod(self.shape) // self.type.size * self.type.num_bytes


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a file says of its model: metadata by its keys, and tensors by transformers' names."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def config(self) -> dict[str, Any]:
        """The model's config.json, with the formats of its tensors as its quantisation.

        Raises ModelError if the architecture is not one that is read, or a key of it is missing.
        """
        architecture = self.metadata.get("general.architecture")
        make = _CONFIGS.get(architecture) if isinstance(architecture, str) else None
        if make is None:
            raise self._refusal("general.architecture", architecture, f"must be one of {', '.join(_CONFIGS)}")
        packed: dict[str, list[str]] = {}
        for name, tensor in self.tensors.items():
            if tensor.type.format:
                packed.setdefault(tensor.type.format, []).append(name.removesuffix(".weight"))
        section = {"quantization_config": {"quant_method": METHOD, "formats": packed}} if packed else {}
        return {**self._common(), **make(self), **section}

    def _common(self) -> dict[str, Any]:
        """What the configs of all families have."""
        embedding = self.tensors.get("model.embed_tokens.weight")
        if embedding is None:
            raise self._refusal("token_embd.weight", None, "must be among the tensors")
        return {
            "hidden_size": self.key("embedding_length"),
            "num_hidden_layers": self.key("block_count"),
            "num_attention_heads": self.key("attention.head_count"),
            "num_key_value_heads": self.key("attention.head_count_kv"),
            "head_dim": self.key("attention.key_length"),
            "num_experts_per_tok": self.key("expert_used_count"),
            "rms_norm_eps": self.key("attention.layer_norm_rms_epsilon"),
            "rope_theta": self.key("rope.freq_base"),
            "max_position_embeddings": self.key("context_length"),
            "vocab_size": embedding.shape[0],
            "tie_word_embeddings": "lm_head.weight" not in self.tensors,
            "hidden_act": "silu",
            "torch_dtype": "bfloat16",
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.metadata.get("tokenizer.ggml.eos_token_id"),
        }

    def key(self, name: str) -> Any:
        """The value under an architecture's key; ModelError if it is missing."""
        name = f"{self.metadata['general.architecture']}.{name}"
        if name not in self.metadata:
            raise self._refusal(name, None, "must be in the metadata")
        return self.metadata[name]

    def _refusal(self, key: str, value: object, rule: str) -> ModelError:
        shown = "<missing>" if value is None else value
        return ModelError(f"{self.path}: {key}", shown, rule, "use safetensors, or a GGUF file of such a model")


def _qwen3_moe(header: GgufHeader) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "intermediate_size": header.metadata.get("qwen3moe.feed_forward_length"),
        "moe_intermediate_size": header.key("expert_feed_forward_length"),
        "num_experts": header.key("expert_count"),
        "norm_topk_prob": True,
    }


def _gpt_oss(header: GgufHeader) -> dict[str, Any]:
    """Every other layer is within a window, beginning with the first."""
    layers, kinds = header.key("block_count"), ("sliding_attention", "full_attention")
    count = layers if isinstance(layers, int) and layers <= MOST_TENSORS else 0
    scaling = {
        "rope_type": "yarn",
        "factor": header.metadata.get("gpt-oss.rope.scaling.factor"),
        "original_max_position_embeddings": header.metadata.get("gpt-oss.rope.scaling.original_context_length"),
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    }
    scaled = header.metadata.get("gpt-oss.rope.scaling.type") == "yarn"
    return {
        "model_type": "gpt_oss",
        "intermediate_size": header.key("expert_feed_forward_length"),
        "num_local_experts": header.key("expert_count"),
        "sliding_window": header.key("attention.sliding_window"),
        "layer_types": [kinds[layer % 2] for layer in range(count)],
        "attention_bias": True,
        "swiglu_limit": 7.0,
        **({"rope_scaling": scaling} if scaled else {}),
    }


_CONFIGS: Final[Mapping[str, Callable[[GgufHeader], dict[str, Any]]]] = {"qwen3moe": _qwen3_moe, "gpt-oss": _gpt_oss}

# -- names ----------------------------------------------------------------------------------------------

_OUTSIDE: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_OF_LAYER: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
    "ffn_up_exps": "mlp.experts.{expert}.up_proj",
    "ffn_down_exps": "mlp.experts.{expert}.down_proj",
}
_NAME: Final = re.compile(r"(?:blk\.(\d{1,6})\.)?(\w+)\.(weight|bias)")


def _named(name: str, tensor: GgufTensor, architecture: object) -> dict[str, GgufTensor]:
    """A tensor by transformers' name, or those of all experts by theirs; as it is if it has no other."""
    found = _NAME.fullmatch(name)
    layer, stem, end = found.groups() if found is not None else (None, "", "")
    theirs = _OUTSIDE.get(stem) if layer is None else _OF_LAYER.get(stem)
    if architecture == "gpt-oss":
        theirs = {"ffn_gate_inp": "mlp.router"}.get(stem, theirs)
        if stem == "attn_sinks":
            return {f"model.layers.{layer}.self_attn.sinks": tensor}
    if theirs is None:
        return {name: tensor}
    whole = f"{theirs}.{end}" if layer is None else f"model.layers.{layer}.{theirs}.{end}"
    if "{expert}" not in whole or len(tensor.shape) < 2 or tensor.shape[0] > MOST_EXPERTS:
        return {whole: tensor}
    one = tensor._replace(shape=tensor.shape[1:])
    return {
        whole.replace("{expert}", str(expert)): one._replace(start=tensor.start + expert * one.num_bytes)
        for expert in range(tensor.shape[0])
    }


# -- the file --------------------------------------------------------------------------------------------


def read_header(path: Path) -> GgufHeader:
    """The header of a GGUF file; ModelError if it is none, or lies of its tensors."""
    with open_regular(path, "a readable GGUF file", ModelError, remedy="check the path") as file:
        try:
            return _Reader(file, path).header()
        except (struct.error, UnicodeDecodeError, OverflowError, MemoryError, OSError) as error:
            raise _damaged(path, type(error).__name__) from error


def _damaged(path: Path, what: str) -> ModelError:
    return ModelError(str(path), f"<{what}>", "must be a whole GGUF file of version 2 or 3", DOWNLOAD_AGAIN)


class _Reader:
    """Reads a file from its beginning."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._scalars: dict[int, Callable[[], Any]] = {
            number: partial(self._scalar, struct.Struct(f"<{code}"))
            for number, code in enumerate(("B", "b", "H", "h", "I", "i", "f", "?", "", "", "Q", "q", "d"))
            if code
        }
        self._scalars[8] = self._string

    def header(self) -> GgufHeader:
        magic, version, num_tensors, num_keys = self._many("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise _damaged(self._path, f"{magic!r}, version {version}")
        self._bound(num_tensors, MOST_TENSORS)
        self._bound(num_keys, MOST_TENSORS)
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            name = self._string()
            metadata[name] = self._value()
        told = [self._tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 1 << 16:
            raise _damaged(self._path, f"an alignment of {alignment!r}")
        first = -(-self._file.tell() // alignment) * alignment
        size = self._file.seek(0, 2)
        tensors: dict[str, GgufTensor] = {}
        for name, kind, shape, offset in told:
            tensor = GgufTensor(kind, shape, first + offset)
            if tensor.start + tensor.num_bytes > size:
                raise _damaged(self._path, f"{name!r} ends behind the file")
            tensors.update(_named(name, tensor, metadata.get("general.architecture")))
        return GgufHeader(self._path, metadata, tensors)

    def _scalar(self, form: struct.Struct) -> Any:
        return form.unpack(self._file.read(form.size))[0]

    def _many(self, codes: str) -> tuple[Any, ...]:
        form = struct.Struct(f"<{codes}")
        return form.unpack(self._file.read(form.size))

    def _bound(self, count: int, most: int) -> int:
        if count > most:
            raise _damaged(self._path, f"{count} of something")
        return count

    def _string(self) -> str:
        (length,) = self._many("Q")
        return self._file.read(self._bound(length, MOST_CHARACTERS)).decode("utf-8", errors="replace")

    def _value(self) -> Any:
        """A value behind its type. Of an array that is long, such as a vocabulary, the items are passed over."""
        (kind,) = self._many("I")
        if kind != 9:
            return self._of(kind)()
        inner, count = self._many("IQ")
        read = self._of(inner)
        items = [read() for _ in range(self._bound(count, MOST_ITEMS))]
        return items if len(items) <= MOST_SHOWN else None

    def _of(self, kind: int) -> Callable[[], Any]:
        if kind not in self._scalars:
            raise _damaged(self._path, f"a value of type {kind}")
        return self._scalars[kind]

    def _tensor(self) -> tuple[str, BlockType, tuple[int, ...], int]:
        name = self._string()
        (num_axes,) = self._many("I")
        shape = self._many(f"{self._bound(num_axes, 4)}Q")[::-1]
        number, offset = self._many("IQ")
        kind = TYPES.get(number)
        if kind is None:
            known = ", ".join(kind.name for kind in TYPES.values())
            raise ModelError(f"{self._path}: {name}", f"<type {number}>", f"must be one of {known}", "use another file")
        if not shape or not all(0 < size <= 1 << 40 for size in shape) or shape[-1] % kind.size:
            raise _damaged(self._path, f"{name!r} of {shape}")
        return name, kind, shape, offset
