"""How packed matrices are published: the tensors that a checkpoint has of each, and what its config.json says.

N rows, W columns.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, final

import torch
from torch import Tensor

from executor.formats import Packed, packed_in
from hrm.errors import ModelError
from hrm.formats import PackedFormat, packed_format

_KNOWN: Final = re.compile(r"int4-g\d+|int8|fp8|fp8-b\d+|mxfp4")
KNOWN: Final = "int4-gN with a group size N, int8, fp8, fp8-bN with a block size N, or mxfp4"

WORD_BYTES: Final = 4
_TOKENS: Final = {"strategy": "token", "symmetric": True, "dynamic": True}


@dataclass(frozen=True, slots=True)
class Scheme(ABC):
    """A way to publish matrices of a format, which transformers and vLLM read."""

    form: PackedFormat

    @property
    @abstractmethod
    def method(self) -> str:
        """How it is called."""

    @abstractmethod
    def parts(self, packed: Packed) -> Mapping[str, Tensor]:
        """The tensors of a matrix; their names are the matrix's and what stands here after it."""

    def shapes(self, rows: int, width: int) -> Mapping[str, Tensor]:
        """Tensors without numbers in place of these."""
        memory = torch.empty(self.form.bytes_of(rows, width), dtype=torch.uint8, device="meta")
        return self.parts(packed_in(self.form, rows, width, memory))

    @abstractmethod
    def config(self, plain: Sequence[str]) -> dict[str, Any]:
        """What config.json says; `plain` are modules with matrices that are not packed."""

    def obstacle(self, width: int) -> str:
        """Why transformers and vLLM do not read matrices of rows so wide, though we do; empty if they do."""
        over = self.form.columns and self.form.rows == 1 and width % self.form.columns
        return f"groups of {self.form.columns} do not divide rows of {width} weights" if over else ""


@final
class CompressedTensors(Scheme):
    """As the library of that name writes them."""

    @property
    def method(self) -> str:
        """Its name and its own name for the format."""
        return f"compressed-tensors, {self._kind}"

    @property
    def _kind(self) -> str:
        return {"fp8": "float-quantized", "fp4": "mxfp4-pack-quantized"}.get(self.form.code, "pack-quantized")

    def parts(self, packed: Packed) -> Mapping[str, Tensor]:
        """Integers in words of 32 bits, less their least one, with the shape beside them; two fp4 to a byte."""
        codes, scales = packed.codes, packed.scales
        match self.form.code:
            case "fp8":
                return {"": codes.view(torch.float8_e4m3fn), "_scale": scales}
            case "fp4":
                return {"_packed": codes, "_scale": scales}
            case code:
                codes = codes ^ 0x80 if code == "int8" else codes
                words = torch.nn.functional.pad(codes, (0, -codes.shape[1] % WORD_BYTES)).view(torch.int32)
                return {"_packed": words, "_scale": scales, "_shape": torch.tensor(packed.shape)}

    def config(self, plain: Sequence[str]) -> dict[str, Any]:
        """One group for all linear modules but the plain ones.

        With fp8 it says that activations are rounded as well, token by token, for only so vLLM reads experts.
        """
        form = self.form
        number = {"num_bits": form.code_bits, "type": "int" if form.code.startswith("int") else "float"}
        strategy = {"strategy": "group", "group_size": form.columns} if form.columns else {"strategy": "channel"}
        weights = {**number, **strategy, "symmetric": True, "dynamic": False}
        if form.code == "fp4":
            weights |= {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": {**number, **_TOKENS} if form.code == "fp8" else None,
            "output_activations": None,
            "format": self._kind,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": self._kind,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(plain),
            "kv_cache_scheme": None,
        }


@final
class Blocks(Scheme):
    """fp8 in square blocks, as DeepSeek-V3 is published."""

    @property
    def method(self) -> str:
        """By its key in config.json."""
        return f"fp8 in blocks of {self.form.rows} × {self.form.columns}"

    def parts(self, packed: Packed) -> Mapping[str, Tensor]:
        """The codes, and the scales that they are multiplied by, whatever the name says."""
        return {"": packed.codes.view(torch.float8_e4m3fn), "_scale_inv": packed.scales}

    def config(self, plain: Sequence[str]) -> dict[str, Any]:
        """All linear modules but the plain ones."""
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [self.form.rows, self.form.columns],
            "modules_to_not_convert": list(plain),
        }


@final
class Stacked(Scheme):
    """MXFP4 of all experts of a layer in one tensor, as gpt-oss is published."""

    @property
    def method(self) -> str:
        """By its key in config.json."""
        return "mxfp4, all experts of a layer in one tensor"

    def parts(self, packed: Packed) -> Mapping[str, Tensor]:
        """The codes by group, and exponents."""
        return {"_blocks": packed.codes.unflatten(1, (packed.scales.shape[1], -1)), "_scales": packed.scales}

    def config(self, plain: Sequence[str]) -> dict[str, Any]:
        """The experts; what is plain is told as gpt-oss tells it, for all layers at once."""
        layers = {name.rpartition(".layers.")[0] for name in plain if ".layers." in name}
        inner = [f"{prefix}.layers.*.{part}" for prefix in sorted(layers) for part in ("self_attn", "mlp.router")]
        return {"quant_method": "mxfp4", "modules_to_not_convert": [*inner, "model.embed_tokens", "lm_head"]}


def scheme_of(name: str, scale: str, *, stacked: bool) -> Scheme:
    """How matrices of that format are published, of a model whose scales of groups have a dtype (bf16, f16 or f32).

    `stacked` says that the family has packed experts in one tensor a layer, as gpt-oss. Raises ModelError for a
    format that nobody publishes, or not so.
    """
    if stacked and name != "mxfp4":
        rule = "must be mxfp4 for this model, whose packed experts are published in one tensor a layer, and so only"
        raise ModelError("--format", name, rule, "use --format mxfp4")
    form = packed_format(name)
    if form is not None and _KNOWN.fullmatch(name):
        if form.code == "fp4":
            return Stacked(form) if stacked else CompressedTensors(form)
        if form.rows > 1:
            return Blocks(form)
        return CompressedTensors(replace(form, scale=scale) if form.columns else form)
    raise ModelError("--format", name, f"must be {KNOWN}", "choose one of these")
