"""RMS normalisation against its formula in float64."""

import pytest
import torch

from sana.ops import rms_norm, rms_norm_2d
from tests.tolerance import assert_rms_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_the_formula(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 5, 17).to(dtype), torch.randn(17).to(dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double()
    out = rms_norm(x, weight, 1e-3)
    assert out.dtype == dtype
    assert_rms_close(out, expected)


def test_the_mean_square_is_taken_in_float32() -> None:
    x = torch.full((1, 8), 3e4, dtype=torch.float16)  # the square overflows float16
    torch.testing.assert_close(rms_norm(x, torch.ones(8, dtype=torch.float16), 1e-6), torch.ones_like(x))


def test_2d_normalises_channels_of_every_pixel() -> None:
    x, weight, bias = torch.randn(2, 6, 3, 4), torch.randn(6), torch.randn(6)
    out = rms_norm_2d(x, weight, bias, 1e-5)
    for row in range(3):
        pixel = rms_norm(x[:, :, row, 1], weight, 1e-5) + bias
        torch.testing.assert_close(out[:, :, row, 1], pixel)
    torch.testing.assert_close(
        rms_norm_2d(x, None, None, 1e-5), (out - bias.view(1, -1, 1, 1)) / weight.view(1, -1, 1, 1)
    )
