"""How large tiles are, and where an image is cut into them. What runs in tiles is in `streaming.py`.

Tiling here is exact: a tile is computed from all the pixels that it depends on, so no seam is there to be blended.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

AUTO_TILE_PIXELS = 2048 * 2048  # an image of more is encoded and decoded in tiles, unless `disable_tiling` forbids it
DEFAULT_TILE = 512  # diffusers' default for AutoencoderDC
DEFAULT_STRIDE = 448
LONG = 16  # tiles, beyond one for each step, that make a progress bar worth showing

Span = tuple[int, int]  # pixels [start, stop)


@dataclass(frozen=True)
class Tiling:
    """Which images are cut into tiles, and how large a tile is. Sizes are pixels of the image.

    Attributes:
        height, width: an image with one side larger than this is tiled (diffusers' `tile_sample_min_*`).
        stride_height, stride_width: the most that one tile makes (diffusers' `tile_sample_stride_*`); what it reads
            is larger by the halo that its layers need.
    """

    height: int = DEFAULT_TILE
    width: int = DEFAULT_TILE
    stride_height: int = DEFAULT_STRIDE
    stride_width: int = DEFAULT_STRIDE

    def applies(self, height: int, width: int) -> bool:
        """Whether an image of this size is cut."""
        return height > self.height or width > self.width


def make_tiling(
    factor: int,
    min_height: float | None = None,
    min_width: float | None = None,
    stride_height: float | None = None,
    stride_width: float | None = None,
) -> Tiling:
    """A tiling from diffusers' arguments.

    Args:
        factor: the autoencoder's downsampling factor; sizes that are given are multiples of it.
        min_height, min_width: see `Tiling.height`; None is 512, or the stride where that is larger.
        stride_height, stride_width: see `Tiling.stride_height`; None is 448, or the size above where that is smaller.

    Raises:
        ValueError: a size is no positive multiple of `factor`, or a stride is larger than the size beside it.
    """
    tall, high = _sizes("height", factor, min_height, stride_height)
    wide, across = _sizes("width", factor, min_width, stride_width)
    return Tiling(tall, wide, high, across)


def _sizes(side: str, factor: int, least: float | None, stride: float | None) -> tuple[int, int]:
    for name, size in ((f"tile_sample_min_{side}", least), (f"tile_sample_stride_{side}", stride)):
        if size is not None and (not size > 0 or size % factor):
            raise ValueError(
                f"{name} must be a positive multiple of {factor}, the downsampling factor of this autoencoder, not "
                f"{size}: take {max(round(size / factor), 1) * factor if math.isfinite(size) else factor}"
            )
    if least is not None and stride is not None and stride > least:
        raise ValueError(
            f"tile_sample_stride_{side} {stride} is larger than tile_sample_min_{side} {least}: an image that is cut "
            "would be larger than the tiles of one that is not; give the larger size for both"
        )
    least = int(least) if least is not None else max(_multiple(DEFAULT_TILE, factor), int(stride or 0))
    return least, int(stride) if stride is not None else min(_multiple(DEFAULT_STRIDE, factor), least)


def _multiple(size: int, factor: int) -> int:
    return max(size // factor, 1) * factor


def cut(size: int, most: int, unit: int = 1) -> list[Span]:
    """Cuts [0, size) into the fewest pieces of at most `most` pixels, as equal as multiples of `unit` allow.

    Args:
        size: a multiple of `unit`.
        most: a piece of one unit may be larger.
        unit: pieces begin at its multiples.
    """
    units, most = size // unit, max(most // unit, 1)
    count = -(-units // most)
    bounds = [i * units // count * unit for i in range(count + 1)]
    return list(pairwise(bounds))


def grid(height: int, width: int, pixels: int, least: int = 1, unit: int = 1) -> tuple[list[Span], list[Span]]:
    """Cuts a map into tiles of about `pixels` pixels, as square as it allows.

    Args:
        height, width: of the map, multiples of `unit`.
        pixels: the most in one tile, unless `least` asks for more.
        least: height and width of a tile are at least this where the map is cut.
        unit: tiles begin at its multiples.

    Returns:
        Spans of rows and of columns.
    """
    least = max(2 * least, unit)  # pieces of `cut` are larger than half of what it is given
    across = min(width, max(math.isqrt(pixels), least, pixels // max(height, 1)))
    return cut(height, max(pixels // across, least), unit), cut(width, across, unit)
