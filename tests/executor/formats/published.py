"""Matrices as tools store them, and the weights that these tools, or the formats' definitions, read back.

N rows, W columns, G groups in a row. Each packer takes a matrix (N, W) in float32, and returns the
tensors that a file has for it, by what their names end with, and the weights that they mean.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

Parts = dict[str, Tensor]
GROUP: Final = 32
BLOCK: Final = 16
FP8_MOST: Final = 448.0


# -- DeepSeek-V3's blocks, and gpt-oss's experts, as transformers reads them ------------------------------


def fp8_blocks(weight: Tensor) -> tuple[Parts, Tensor]:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    rows, width = weight.shape
    whole = torch.nn.functional.pad(weight, (0, 0, 0, -rows % BLOCK))  # transformers reads whole blocks only
    blocks = whole.view(-1, BLOCK, width // BLOCK, BLOCK)
    scales = blocks.abs().amax(dim=(1, 3)) / FP8_MOST
    codes = (blocks / scales[:, None, :, None]).view(-1, width).to(torch.float8_e4m3fn)
    reader: Any = Fp8Dequantize(None)
    back = reader._dequantize_one(codes, scales, torch.float32)
    return {".weight": codes[:rows], ".weight_scale_inv": scales}, back[:rows]


def fp8_whole(weight: Tensor) -> tuple[Parts, Tensor]:
    scale = weight.abs().max() / FP8_MOST
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {".weight": codes, ".weight_scale": scale, ".input_scale": scale.clone()}, codes.float() * scale


def mxfp4_stack(weights: Tensor) -> tuple[Parts, Tensor]:
    """Of experts (E, W, N), of which only the shape counts."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    experts, width, rows = weights.shape
    blocks = torch.randint(0, 256, (experts, rows, width // GROUP, GROUP // 2), dtype=torch.uint8)
    scales = torch.randint(122, 126, (experts, rows, width // GROUP), dtype=torch.uint8)
    return {"_blocks": blocks, "_scales": scales}, convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)


# -- compressed-tensors, by its own package -------------------------------------------------------------


def compressed(kind: str, **args: Any) -> Callable[[Tensor], tuple[Parts, Tensor]]:
    """A packer by the package, with a scheme of these arguments."""

    def pack(weight: Tensor) -> tuple[Parts, Tensor]:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.config import CompressionFormat
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        scheme = QuantizationScheme(
            targets=["Linear"], weights=QuantizationArgs(**args), format=CompressionFormat(kind)
        )
        state = {"weight": weight, **{name: part.contiguous() for name, part in _parameters(weight, **args).items()}}
        compressor: Any = BaseCompressor.get_value_from_registry(kind)
        stored = compressor.compress(state, scheme)
        scales = stored["weight_scale"]  # in whose dtype the package would compute
        exact = {"weight_scale": scales.float()} if scales.dtype is torch.bfloat16 else {}
        back = compressor.decompress({**stored, **exact}, scheme)["weight"].float()
        if kind == "nvfp4-pack-quantized":  # what the package returns is rounded to bfloat16
            back = _nvfp4(stored, back)
        return {f".{name}": part for name, part in stored.items()}, back

    return pack


def _nvfp4(stored: Parts, rounded: Tensor) -> Tensor:
    """The package's codes with its scales, as its function says that they are multiplied."""
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    codes = unpack_fp4_from_uint8(stored["weight_packed"], *rounded.shape, dtype=torch.float32)
    scales = stored["weight_scale"].float() / stored["weight_global_scale"]
    exact = codes * scales.repeat_interleave(16, dim=1)
    torch.testing.assert_close(rounded, exact, rtol=2**-6, atol=0)
    return exact


def _parameters(weight: Tensor, *, num_bits: int, symmetric: bool = True, **args: Any) -> Parts:
    """Scales that use the whole range, and zero points."""
    rows, width = weight.shape
    strategy = args["strategy"]
    if strategy == "block":
        blocks = weight.view(rows // BLOCK, BLOCK, width // BLOCK, BLOCK)
        return {"weight_scale": (blocks.abs().amax(dim=(1, 3)) / FP8_MOST).bfloat16()}
    most = FP8_MOST if args["type"] == "float" else 2 ** (num_bits - 1) - 1
    group = args.get("group_size") or width
    groups = weight.view(rows, width // group, group)
    if strategy == "tensor_group":
        whole = FP8_MOST * 6 / weight.abs().max().view(1)
        scales = (groups.abs().amax(-1) / 6 * whole).to(torch.float8_e4m3fn).float()
        return {"weight_scale": scales, "weight_global_scale": whole}
    if strategy == "tensor":
        return {"weight_scale": (weight.abs().max() / most).view(1).bfloat16()}
    if num_bits == 4 and args["type"] == "float":
        return {"weight_scale": torch.exp2((groups.abs().amax(-1) / 6).log2().ceil())}
    if symmetric:
        return {"weight_scale": (groups.abs().amax(-1) / most).bfloat16()}
    least, highest = groups.amin(-1), groups.amax(-1)
    scales = ((highest - least) / 15).bfloat16()
    zeros = (-8 - least / scales.float()).round().clamp(-8, 7).to(torch.int8)
    return {"weight_scale": scales, "weight_zero_point": zeros}


# -- GPTQ, AWQ and ModelOpt, by their definitions -----------------------------------------------------------


def _asymmetric(weight: Tensor, order: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (N, W), zero points and scales (N, G) of columns that belong to groups."""
    members = [weight[:, order == group] for group in range(groups)]
    least = torch.stack([part.amin(1) for part in members], 1).clamp(max=0)
    most = torch.stack([part.amax(1) for part in members], 1)
    scales = ((most - least) / 15).half()
    zeros = (-least / scales.float()).round().clamp(1, 15)
    codes = (weight / scales.float()[:, order] + zeros[:, order]).round().clamp(0, 15)
    return codes.int(), zeros.int(), scales


def _in_words(numbers: Tensor, places: tuple[int, ...]) -> Tensor:
    """Numbers in words of 32 bits along the last axis; the one of a place is so many bits of four up."""
    bits = 32 // len(places)
    words = torch.zeros(*numbers.shape[:-1], numbers.shape[-1] // len(places), dtype=torch.int64)
    for i, place in enumerate(places):
        words |= numbers[..., i :: len(places)].long() << bits * place
    return (words - (words >> 31 << 32)).int()


def gptq(*, ordered: bool = False, less: int = 1) -> Callable[[Tensor], tuple[Parts, Tensor]]:
    """AutoGPTQ's: words of eight rows of the transposed matrix, and zero points that are one less."""

    def pack(weight: Tensor) -> tuple[Parts, Tensor]:
        width = weight.shape[1]
        order = torch.arange(width) // GROUP
        if ordered:
            order = order[torch.randperm(width, generator=torch.Generator().manual_seed(width))]
        codes, zeros, scales = _asymmetric(weight, order, width // GROUP)
        parts = {
            ".qweight": _in_words(codes, tuple(range(8))).T.contiguous(),
            ".qzeros": _in_words(zeros.T - less, tuple(range(8))),
            ".scales": scales.T.contiguous(),
            ".g_idx": order.int(),
        }
        return parts, (codes - zeros[:, order]) * scales.float()[:, order]

    return pack


def gptq_symmetric(bits: int, group: int = GROUP) -> Callable[[Tensor], tuple[Parts, Tensor]]:
    """Whose zero points are all alike; a group of 0 columns is a whole row."""

    def pack(weight: Tensor) -> tuple[Parts, Tensor]:
        rows, width = weight.shape
        zero, columns = 1 << bits - 1, group or width
        order = torch.arange(width) // columns
        scales = (weight.view(rows, -1, columns).abs().amax(-1) / (zero - 1)).half()
        codes = (weight / scales.float()[:, order]).round().int() + zero
        places = tuple(range(32 // bits))
        parts = {
            ".qweight": _in_words(codes, places).T.contiguous(),
            ".qzeros": _in_words(torch.full((width // columns, rows), zero - 1), places),
            ".scales": scales.T.contiguous(),
            ".g_idx": order.int(),
        }
        return parts, (codes - zero) * scales.float()[:, order]

    return pack


def awq(weight: Tensor) -> tuple[Parts, Tensor]:
    """AutoAWQ's: words of eight columns of the transposed matrix, the even ones first."""
    order = torch.arange(weight.shape[1]) // GROUP
    codes, zeros, scales = _asymmetric(weight, order, weight.shape[1] // GROUP)
    even_first = (0, 4, 1, 5, 2, 6, 3, 7)
    parts = {
        ".qweight": _in_words(codes.T, even_first),
        ".qzeros": _in_words(zeros.T, even_first),
        ".scales": scales.T.contiguous(),
    }
    return parts, (codes - zeros[:, order]) * scales.float()[:, order]


def modelopt_nvfp4(weight: Tensor) -> tuple[Parts, Tensor]:
    """compressed-tensors' parts under other names, with a factor that is not reciprocal."""
    parts, back = compressed("nvfp4-pack-quantized", **NVFP4)(weight)
    factor = 1 / parts[".weight_global_scale"]
    return {
        ".weight": parts[".weight_packed"],
        ".weight_scale": parts[".weight_scale"].to(torch.float8_e4m3fn),
        ".weight_scale_2": factor.view(()),
        ".input_scale": factor.view(()).clone(),
    }, back


NVFP4: Final[dict[str, Any]] = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}


def _groups(kind: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": group}}


@dataclass(frozen=True)
class Published:
    """A way to publish weights: a packer, what the config says, and our format."""

    pack: Callable[[Tensor], tuple[Parts, Tensor]]
    config: Mapping[str, Any]
    format: str


def _compressed(kind: str, name: str, **args: Any) -> Published:
    told = {**args, "block_structure": [BLOCK, BLOCK]} if args["strategy"] == "block" else args
    return Published(compressed(kind, **told), _groups(kind, **told), name)


_GPTQ: Final = {"quant_method": "gptq", "bits": 4, "group_size": GROUP}
_INT: Final[dict[str, Any]] = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": GROUP}
_ROWS: Final[dict[str, Any]] = {"num_bits": 8, "strategy": "channel"}
PUBLISHED: Final[Mapping[str, Published]] = {
    "fp8 in blocks": Published(fp8_blocks, {"quant_method": "fp8", "weight_block_size": [BLOCK] * 2}, "fp8-b16"),
    "fp8, one scale": Published(fp8_whole, {"quant_method": "fp8", "activation_scheme": "static"}, "fp8"),
    "int4": _compressed("pack-quantized", "int4-g32", **_INT),
    "int4 with zeros": _compressed("pack-quantized", "int4-g32-z", **_INT, symmetric=False),
    "int8 in words": _compressed("pack-quantized", "int8-g32", **{**_INT, "num_bits": 8}),
    "int4 in rows": _compressed("pack-quantized", "int4", type="int", **{**_ROWS, "num_bits": 4}),
    "int8": _compressed("int-quantized", "int8", type="int", **_ROWS),
    "float8": _compressed("float-quantized", "fp8", type="float", **_ROWS),
    "float8, one scale": _compressed("float-quantized", "fp8", type="float", **{**_ROWS, "strategy": "tensor"}),
    "float8 in blocks": _compressed("float-quantized", "fp8-b16", type="float", **{**_ROWS, "strategy": "block"}),
    "nvfp4": _compressed("nvfp4-pack-quantized", "nvfp4", **NVFP4),
    "mxfp4": _compressed("mxfp4-pack-quantized", "mxfp4", **{**_INT, "type": "float"}),
    "gptq": Published(gptq(), {**_GPTQ, "sym": False}, "int4-g32-f16-z"),
    "gptq v2": Published(gptq(less=0), {**_GPTQ, "sym": False, "checkpoint_format": "gptq_v2"}, "int4-g32-f16-z"),
    "gptq in order": Published(gptq(ordered=True), {**_GPTQ, "sym": False, "desc_act": True}, "int4-g32-f16-z-o"),
    "gptq, symmetric": Published(gptq_symmetric(4), _GPTQ, "int4-g32-f16"),
    "gptq, 8 bits": Published(gptq_symmetric(8), {**_GPTQ, "bits": 8}, "int8-g32-f16"),
    "gptq in rows": Published(gptq_symmetric(4, group=0), {**_GPTQ, "group_size": -1}, "int4"),
    "awq": Published(awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, "int4-g32-f16-z"),
    "modelopt fp8": Published(fp8_whole, {"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8"),
    "modelopt nvfp4": Published(modelopt_nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
}
