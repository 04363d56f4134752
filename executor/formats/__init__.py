"""Packed weights: matrices of narrow numbers with scales, as checkpoints have them and as kernels read them."""

from executor.formats.cut import Cut
from executor.formats.packed import Matrix, Packed, packed_in, read_numbers

__all__ = ["Cut", "Matrix", "Packed", "packed_in", "read_numbers"]
