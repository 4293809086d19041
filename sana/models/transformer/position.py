"""Position embeddings: 2-D sine-cosine tables and rotary angles. Every function depends on height AND width."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]  # cosines and sines, (N, d) each
ROPE_THETA = 10000.0


def sincos_2d(
    dim: int, grid: tuple[int, int], pe_interpolation: float = 1.0, base_size: int = 16, dtype: type = np.float64
) -> np.ndarray:
    """Fixed sine-cosine embedding of a grid (PixArt, DiT), scaled so that `base_size` positions fill each axis.

    Args:
        dim: width D, a multiple of 4. The first half encodes the column, the second half the row.
        grid: (H, W) in tokens.
        pe_interpolation: divisor of all positions.
        base_size: number of tokens per side that the model was made for.
        dtype: of the result; it is computed in float64.

    Returns:
        (H * W, D), row-major.
    """
    if dim % 4:
        raise ValueError(f"the sincos position embedding needs a width that is a multiple of 4, not {dim}.")
    height, width = grid
    # The official code makes float32 positions and widens them in the outer product with the float64 frequencies.
    rows = np.arange(height, dtype=np.float32) / (height / base_size) / pe_interpolation
    columns = np.arange(width, dtype=np.float32) / (width / base_size) / pe_interpolation
    halves = np.empty((height, width, 2, dim // 2), dtype)
    halves[:, :, 0] = _sincos_1d(dim // 2, columns)  # all rows alike: each axis is computed once
    halves[:, :, 1] = _sincos_1d(dim // 2, rows)[:, None]
    return halves.reshape(height * width, dim)


def _sincos_1d(dim: int, positions: np.ndarray) -> np.ndarray:
    frequencies = 1.0 / 10000 ** (np.arange(dim // 2, dtype=np.float64) / (dim / 2.0))
    angles = np.outer(positions, frequencies)  # (positions, dim / 2)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


@lru_cache(maxsize=16)
def sincos_table(dim: int, grid: tuple[int, int], pe_interpolation: float, base_size: int) -> Tensor:
    """`sincos_2d` as a float32 CPU tensor (1, N, D). The key is the whole grid, never the number of tokens."""
    with torch.inference_mode(False):  # a kept table must serve training after it was made in inference
        return torch.from_numpy(sincos_2d(dim, grid, pe_interpolation, base_size, np.float32)).unsqueeze(0)


def rotary_axes(head_dim: int) -> tuple[int, int, int]:
    """Splits a head over (frame, row, column): an image has one frame, so rows and columns get half each."""
    if head_dim % 4:
        raise ValueError(f"rotary embedding needs a head dimension that is a multiple of 4, not {head_dim}.")
    return 0, head_dim // 2, head_dim // 2


@lru_cache(maxsize=16)
def rotary_table(axes: tuple[int, int, int], grid: tuple[int, int], pe_interpolation: float = 1.0) -> Rotary:
    """Cosines and sines of the rotary embedding of a grid (Su et al. 2021, per axis as in FLUX).

    Args:
        axes: even widths for frame, row and column; their sum is the head dimension d.
        grid: (H, W) in tokens.
        pe_interpolation: divisor of all positions.

    Returns:
        Two float32 CPU tensors (N, d); neighbouring pairs of channels share an angle.
    """
    height, width = grid
    rows = np.repeat(np.arange(height), width)
    columns = np.tile(np.arange(width), height)
    angles = []
    for dim, positions in zip(axes, (np.zeros(height * width), rows, columns), strict=True):
        frequencies = ROPE_THETA ** -(np.arange(0, dim, 2) / max(dim, 1))
        angles.append(np.outer(positions / pe_interpolation, frequencies).repeat(2, axis=1))
    angle = np.concatenate(angles, axis=1)  # (N, d)
    with torch.inference_mode(False):
        return torch.from_numpy(np.cos(angle)).float(), torch.from_numpy(np.sin(angle)).float()


def apply_rotary(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotates neighbouring pairs of channels by their position's angle.

    Args:
        x: (B, h, N, d).
        rotary: cosines and sines (N, d).

    Returns:
        (B, h, N, d), dtype of `x`; the rotation is done in float32 or wider.
    """
    cosines, sines = rotary
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)  # (B, h, N, d)
    return (wide * cosines + turned * sines).to(x.dtype)
