"""Rotary embedding: pairs of a head's elements turn with the token's position.

T tokens, H heads, d head_dim, h rotated pairs of a head.
"""

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from executor.model.workspace import Workspace
from executor.native import kernels


@dataclass(frozen=True, slots=True)
class Rotary:
    """How the first 2h elements of a head turn, by `frequencies` radians a position.

    Element i turns with element i + h, or if `interleaved` 2i with 2i + 1. Cosine and sine are
    multiplied by `magnitude`.
    """

    frequencies: tuple[float, ...]
    interleaved: bool = False
    magnitude: float = 1.0

    @staticmethod
    def plain(num_elements: int, theta: float, *, interleaved: bool = False) -> "Rotary":
        """The rotation of that many elements by powers of the base theta (arXiv 2104.09864)."""
        return Rotary(plain_frequencies(num_elements, theta), interleaved)

    def turn(self, x_TW: Tensor, num_heads: int, head_dim: int, positions_T: Tensor, workspace: Workspace) -> None:
        """Rotate, in place, the first `num_heads` heads of rows that may have more elements."""
        tokens, half = x_TW.shape[0], len(self.frequencies)
        frequencies_h = on_device(self.frequencies, x_TW.device)
        native = kernels()
        if native is not None and native.takes_rotation(x_TW, positions_T):
            native.rotate(
                x_TW,
                num_heads,
                positions_T,
                frequencies_h,
                head_dim=head_dim,
                interleaved=self.interleaved,
                magnitude=self.magnitude,
            )
            return
        mark = workspace.mark()
        angles_T1h = workspace.take((tokens, 1, half), torch.float32)
        cos_T1h = workspace.take((tokens, 1, half), torch.float32)
        torch.mul(positions_T.view(-1, 1, 1), frequencies_h, out=angles_T1h)
        torch.cos(angles_T1h, out=cos_T1h)
        sin_T1h = angles_T1h.sin_()
        if self.magnitude != 1:
            cos_T1h.mul_(self.magnitude)
            sin_T1h.mul_(self.magnitude)
        if x_TW.dtype is not torch.float32:
            cos_T1h = workspace.take(cos_T1h.shape, x_TW.dtype).copy_(cos_T1h)
            sin_T1h = workspace.take(sin_T1h.shape, x_TW.dtype).copy_(sin_T1h)
        # Of the last head there may be no more than what turns.
        heads_THd = x_TW.as_strided((tokens, num_heads, 2 * half), (x_TW.stride(0), head_dim, 1))
        if self.interleaved:
            first, second = heads_THd[..., 0 : 2 * half : 2], heads_THd[..., 1 : 2 * half : 2]
        else:
            first, second = heads_THd[..., :half], heads_THd[..., half : 2 * half]
        first_sin = workspace.take((tokens, num_heads, half), x_TW.dtype)
        torch.mul(first, sin_T1h, out=first_sin)
        first.mul_(cos_T1h).addcmul_(second, sin_T1h, value=-1)
        second.mul_(cos_T1h).add_(first_sin)
        workspace.release(mark)


@lru_cache(maxsize=32)
def plain_frequencies(num_elements: int, theta: float) -> tuple[float, ...]:
    """Radians per position of the num_elements/2 rotations, as float32 has them."""
    exponents = torch.arange(0, num_elements, 2, dtype=torch.float32) / num_elements
    return tuple((1.0 / theta**exponents).tolist())


@cache  # for good: tapes of native calls read them where they lie
def on_device(frequencies: tuple[float, ...], device: torch.device) -> Tensor:
    """The frequencies where they are computed with, float32."""
    return torch.tensor(frequencies, dtype=torch.float32).to(device)
