"""One GGUF file: where its tensors lie in it, by transformers' names, and their numbers.

What has no packed format of ours is read as numbers; the `gguf` package knows how most of that is stored.
"""

from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from executor.errors import CheckpointError
from executor.formats import Cut
from executor.safetensors_file import FLOAT_DTYPES, StoredTensor, TensorFile
from hrm.model_spec.gguf import GgufHeader, GgufTensor


@final
class GgufFile(TensorFile):
    """A GGUF file whose header was read."""

    def __init__(self, path: Path, header: GgufHeader) -> None:
        super().__init__(path, "a readable GGUF file")
        self._others = {
            name: tensor
            for name, tensor in header.tensors.items()
            if tensor.type.name not in FLOAT_DTYPES and not tensor.type.format
        }
        self.tensors = {name: self._stored(name, tensor) for name, tensor in header.tensors.items()}

    def _stored(self, name: str, tensor: GgufTensor) -> StoredTensor:
        """Packed matrices are rows of bytes."""
        if name in self._others:
            return StoredTensor("F32", tensor.shape, tensor.start)
        kind = tensor.type
        row = tensor.shape[-1] if kind.size == 1 else tensor.shape[-1] // kind.size * kind.num_bytes
        return StoredTensor(kind.name, (*tensor.shape[:-1], row), tensor.start)

    def read_into(self, name: str, out: Tensor, first_row: int, cut: Cut | None = None) -> None:
        """Fill `out` with rows of a tensor, converted to its dtype, or with a part of a matrix; see TensorFile."""
        tensor = self._others.get(name)
        if tensor is None:
            super().read_into(name, out, first_row, cut)
            return
        here = cut or Cut(tuple(out.shape))
        row = tensor.shape[-1] // tensor.type.size * tensor.type.num_bytes
        stored = torch.empty(len(out), row, dtype=torch.uint8)
        self._read(tensor.start + (first_row + here.row) * row, stored)
        quants = self._quants()
        kind = quants.GGMLQuantizationType[tensor.type.name]
        meant = torch.from_numpy(quants.dequantize(stored.numpy(), kind)).view(len(out), -1)
        out.copy_(meant[:, here.column : here.column + prod(out.shape[1:])].view(out.shape))

    def _quants(self) -> Any:
        try:
            return import_module("gguf.quants")
        except ImportError as error:
            kinds = ", ".join(sorted({tensor.type.name for tensor in self._others.values()}))
            raise CheckpointError(
                str(self.path), f"<{kinds}>", "needs the gguf package to be read", "pip install 'moe-hrm[gguf]'"
            ) from error
