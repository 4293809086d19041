"""MS-SSIM: how alike two pictures look, from means, contrasts and structures at five scales. No network is needed.

Multi-scale structural similarity (Wang, Simoncelli and Bovik 2003) stands where LPIPS would: LPIPS needs weights that
are fetched, and these formulas follow what people see better than the squared error does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the scales, finest first; the paper's, fitted to observers
WINDOW, SIGMA = 11, 1.5
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
SMALLEST = WINDOW * 2 ** (len(EXPONENTS) - 1)  # side in pixels that leaves a window at the coarsest scale


def ms_ssim(first: Tensor, second: Tensor) -> Tensor:
    """Returns the similarity of each pair of pictures, 1 for equal ones.

    Args:
        first: (B, 3, H, W) in [0, 1], both sides at least `SMALLEST` pixels.
        second: the same.

    Returns:
        (B,) float64; structures that are opposite count as 0.

    Raises:
        ValueError: the shapes differ, or a side is too small.
    """
    if first.shape != second.shape or first.dim() != 4 or first.shape[1] != 3 or min(first.shape[2:]) < SMALLEST:
        raise ValueError(
            f"MS-SSIM compares pictures (B, 3, H, W) of {SMALLEST} pixels or more, not {tuple(first.shape)} and "
            f"{tuple(second.shape)}."
        )
    weights = torch.tensor(LUMA, dtype=torch.float64)[:, None, None]
    one, other = ((picture.double().cpu() * weights).sum(dim=1, keepdim=True) for picture in (first, second))
    result = torch.ones(len(first), dtype=torch.float64)
    for index, exponent in enumerate(EXPONENTS):
        luminance, structure = _similarities(one, other)
        last = index == len(EXPONENTS) - 1
        found = (luminance * structure if last else structure).flatten(1).mean(dim=1)
        result = result * found.clamp_min(0).pow(exponent)
        one, other = F.avg_pool2d(one, 2), F.avg_pool2d(other, 2)
    return result


def _similarities(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance term, and contrast-and-structure term, of every window of two grey pictures (B, 1, H, W)."""
    small_luminance, small_contrast = 0.01**2, 0.03**2  # the paper's K1 and K2, for a range of 1
    mean, other_mean = _blur(one), _blur(other)
    variance, other_variance = _blur(one * one) - mean**2, _blur(other * other) - other_mean**2
    covariance = _blur(one * other) - mean * other_mean
    luminance = (2 * mean * other_mean + small_luminance) / (mean**2 + other_mean**2 + small_luminance)
    structure = (2 * covariance + small_contrast) / (variance + other_variance + small_contrast)
    return luminance, structure


def _blur(grey: Tensor) -> Tensor:
    """Gaussian mean of every window that lies inside of the picture."""
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    taps = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    taps = taps / taps.sum()
    return F.conv2d(F.conv2d(grey, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1))
