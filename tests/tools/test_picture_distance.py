"""MS-SSIM against a version written with scipy's filters, and the properties that its authors claim."""

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d

from tools.picture_distance import EXPONENTS, SMALLEST, ms_ssim


def picture(seed: int, size: tuple[int, int] = (192, 200)) -> torch.Tensor:
    """Smooth shapes with some texture, (1, 3, H, W) in [0, 1]."""
    noise = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(noise, size=size, mode="bicubic")
    return (smooth + 0.1 * torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(seed + 1))).clamp(0, 1)


def blurred(image: np.ndarray) -> np.ndarray:
    taps = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    taps /= taps.sum()
    return correlate1d(correlate1d(image, taps, axis=0), taps, axis=1)[5:-5, 5:-5]


def reference(first: torch.Tensor, second: torch.Tensor) -> float:
    weights = np.array([0.299, 0.587, 0.114])
    one, other = ((image[0].double().permute(1, 2, 0).numpy() @ weights) for image in (first, second))
    total = 1.0
    for index, exponent in enumerate(EXPONENTS):
        m1, m2 = blurred(one), blurred(other)
        v1, v2 = blurred(one**2) - m1**2, blurred(other**2) - m2**2
        cov = blurred(one * other) - m1 * m2
        value = (2 * cov + 0.0009) / (v1 + v2 + 0.0009)
        if index == len(EXPONENTS) - 1:
            value = value * (2 * m1 * m2 + 0.0001) / (m1**2 + m2**2 + 0.0001)
        total *= max(value.mean(), 0) ** exponent
        one, other = (
            image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2].reshape(
                image.shape[0] // 2, 2, image.shape[1] // 2, 2
            ).mean(axis=(1, 3))
            for image in (one, other)
        )  # fmt: skip
    return total


@pytest.mark.parametrize("strength", [0.02, 0.1, 0.4])
def test_it_is_the_formula(strength):
    first = picture(1)
    second = ((1 - strength) * first + strength * picture(5)).clamp(0, 1)
    assert float(ms_ssim(first, second)) == pytest.approx(reference(first, second), rel=1e-9)


def test_it_is_one_for_equal_pictures_symmetric_and_falls_with_noise():
    first = torch.cat([picture(1), picture(3)])
    assert torch.allclose(ms_ssim(first, first), torch.ones(2, dtype=torch.float64))
    noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(0))
    values = [ms_ssim(first, (first + strength * noise).clamp(0, 1)) for strength in (0.01, 0.05, 0.2)]
    assert (values[0] > values[1]).all() and (values[1] > values[2]).all()
    second = first.flip(0)
    assert torch.allclose(ms_ssim(first, second), ms_ssim(second, first))
    assert torch.allclose(ms_ssim(first, second)[:1], ms_ssim(first[:1], second[:1]))


def test_the_opposite_counts_as_nothing():
    first = picture(1)
    assert float(ms_ssim(first, 1 - first)) == 0


def test_small_and_unequal_pictures_are_refused():
    ms_ssim(torch.rand(1, 3, SMALLEST, SMALLEST), torch.rand(1, 3, SMALLEST, SMALLEST))
    for shape in ((1, 3, SMALLEST - 1, 300), (1, 1, 300, 300)):
        with pytest.raises(ValueError, match="MS-SSIM compares pictures"):
            ms_ssim(torch.rand(shape), torch.rand(shape))
    with pytest.raises(ValueError, match="MS-SSIM compares pictures"):
        ms_ssim(torch.rand(1, 3, 200, 200), torch.rand(2, 3, 200, 200))
