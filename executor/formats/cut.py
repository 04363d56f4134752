"""A part of a matrix: of several GPUs in tensor parallel each reads its own."""

from typing import NamedTuple


class Cut(NamedTuple):
    """What begins with that row and column of a matrix, or of a vector, that has the shape."""

    shape: tuple[int, ...]
    row: int = 0
    column: int = 0

    @property
    def width(self) -> int:
        """Elements of a row of the whole."""
        return self.shape[1] if len(self.shape) > 1 else 1
