"""How packed matrices are published: the tensors that a checkpoint has of each, and what its config.json says.

N rows, W columns.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, final

import torch
from torch import Tensor

from executor.formats import Packed, packed_in
from executor.formats.schemes import SCHEMES, InRows
from hrm.contract.quantising import WRITTEN, is_written
from hrm.errors import ModelError
from hrm.formats import PackedFormat, packed_format
from hrm.model_spec.quantisation import Packing

WORD_BYTES: Final = 4
SHAPE: Final = ".weight_shape"  # of integers in words
_TOKENS: Final = {"strategy": "token", "symmetric": True, "dynamic": True}


@dataclass(frozen=True, slots=True)
class Publication(ABC):
    """A way to publish matrices of a format, which transformers and vLLM read."""

    form: PackedFormat

    @property
    @abstractmethod
    def packing(self) -> Packing:
        """How files keep them."""

    @property
    @abstractmethod
    def method(self) -> str:
        """How it is called."""

    @abstractmethod
    def codes(self, codes: Tensor) -> Tensor:
        """The codes of a matrix, bytes, as they are stored."""

    @abstractmethod
    def config(self, plain: Sequence[str]) -> dict[str, Any]:
        """What config.json says; `plain` are modules with matrices that are not packed."""

    def parts(self, packed: Packed) -> dict[str, Tensor]:
        """The tensors of a matrix, by what their names end with after that of its module."""
        kept = SCHEMES[self.packing]
        assert isinstance(kept, InRows), self.packing
        shape = {SHAPE: torch.tensor(packed.shape)} if kept.words else {}
        return {kept.codes: self.codes(packed.codes), kept.scales[0]: packed.scales, **shape}

    def shapes(self, rows: int, width: int) -> dict[str, Tensor]:
        """Tensors without numbers in place of these."""
        memory = torch.empty(self.form.bytes_of(rows, width), dtype=torch.uint8, device="meta")
        return self.parts(packed_in(self.form, rows, width, memory))

    def obstacle(self, width: int) -> str:
        """Why transformers and vLLM do not read matrices of rows so wide, though we do; empty if they do."""
        over = self.form.columns and self.form.rows == 1 and width % self.form.columns
        return f"groups of {self.form.columns} do not divide rows of {width} weights" if over else ""


@final
class CompressedTensors(Publication):
    """As the library of that name writes them."""

    @property
    def packing(self) -> Packing:
        """Integers in words, in which they have no signs."""
        return {"fp8": Packing.PLAIN_FLOAT, "fp4": Packing.PACKED_MXFP4}.get(self.form.code, Packing.PACKED_INT)

    @property
    def method(self) -> str:
        """Its name and its own name for the format."""
        return f"compressed-tensors, {self.packing}"

    def codes(self, codes: Tensor) -> Tensor:
        """Integers in words of 32 bits, less their least one."""
        match self.form.code:
            case "fp8":
                return codes.view(torch.float8_e4m3fn)
            case "fp4":
                return codes
            case code:
                without_signs = codes ^ 0x80 if code == "int8" else codes
                return torch.nn.functional.pad(without_signs, (0, -codes.shape[1] % WORD_BYTES)).view(torch.int32)

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
            "format": self.packing,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": self.packing,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(plain),
            "kv_cache_scheme": None,
        }


@final
class Blocks(Publication):
    """fp8 in square blocks, as DeepSeek-V3 is published."""

    @property
    def packing(self) -> Packing:
        """Scales are what codes are multiplied by, though they are called inverse."""
        return Packing.FP8

    @property
    def method(self) -> str:
        """By its key in config.json."""
        return f"fp8 in blocks of {self.form.rows} × {self.form.columns}"

    def codes(self, codes: Tensor) -> Tensor:
        """As they are."""
        return codes.view(torch.float8_e4m3fn)

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
class Stacked(Publication):
    """MXFP4 of all experts of a layer in one tensor, as gpt-oss is published."""

    @property
    def packing(self) -> Packing:
        """All experts together."""
        return Packing.MXFP4

    @property
    def method(self) -> str:
        """By its key in config.json."""
        return "mxfp4, all experts of a layer in one tensor"

    def codes(self, codes: Tensor) -> Tensor:
        """By group."""
        return codes.unflatten(1, (-1, self.form.columns * self.form.code_bits // 8))

    def config(self, plain: Sequence[str]) -> dict[str, Any]:
        """The experts; what is plain is told as gpt-oss tells it, for all layers at once."""
        layers = {name.rpartition(".layers.")[0] for name in plain if ".layers." in name}
        inner = [f"{prefix}.layers.*.{part}" for prefix in sorted(layers) for part in ("self_attn", "mlp.router")]
        return {"quant_method": "mxfp4", "modules_to_not_convert": [*inner, "model.embed_tokens", "lm_head"]}


def publication_of(name: str, scale: str, *, stacked: bool) -> Publication:
    """How matrices of that format are published, of a model whose scales of groups have a dtype (bf16, f16 or f32).

    `stacked` says that the family has packed experts in one tensor a layer, as gpt-oss. Raises ModelError for a
    format that nobody publishes, or not so.
    """
    if stacked and name != "mxfp4":
        rule = "must be mxfp4 for this model, whose packed experts are published in one tensor a layer, and so only"
        raise ModelError("--format", name, rule, "use --format mxfp4")
    form = packed_format(name)
    if form is not None and is_written(name):
        if form.code == "fp4":
            return Stacked(form) if stacked else CompressedTensors(form)
        if form.rows > 1:
            return Blocks(form)
        return CompressedTensors(replace(form, scale=scale) if form.columns else form)
    raise ModelError("--format", name, f"must be {WRITTEN}", "choose one of these")
