"""Packed weights: matrices of narrow numbers with scales, as checkpoints have them and as kernels read them."""

from executor.formats.packed import Matrix, Packed, packed_in

__all__ = ["Matrix", "Packed", "packed_in"]
