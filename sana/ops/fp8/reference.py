"""Quantise, multiply, scale back: a linear layer in e4m3 with one scale a row, in float32. No fp8 hardware is used.

e4m3 (Micikevicius et al. 2022, 2209.05433; PyTorch's `float8_e4m3fn`) has 4 bits of exponent and 3 of mantissa, the
greatest value 448, the smallest normal value 2^-6, no infinity.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


class Fp8Rows(NamedTuple):
    """A matrix of e4m3 numbers with one float32 factor a row."""

    values: Tensor  # (M, K) float8_e4m3fn
    scale: Tensor  # (M, 1) float32


def quantize_rows(x: Tensor) -> Fp8Rows:
    """Returns the rows of a matrix as e4m3 numbers whose greatest magnitude is 448, and the factors back.

    A number is off by at most 1/16 of itself, or by 2^-10 of its row's scale where that is more. A row of zeros stays
    zero; a row with NaN or infinity becomes NaN as a whole, so that nothing wrong is hidden.

    Args:
        x: (M, K), any floating dtype.
    """
    wide = x.float()
    scale = (wide.abs().amax(dim=1, keepdim=True) / FP8_MAX).clamp_min(_SMALLEST_SCALE)  # clamp_min keeps NaN
    # The quotient can exceed 448 by its own rounding only, which the conversion rounds back.
    values = (wide / scale).to(FP8)
    return Fp8Rows(values, scale)


def dequantize_rows(rows: Fp8Rows) -> Tensor:
    """Returns the numbers that a quantised matrix stands for: (M, K) float32."""
    return rows.values.float() * rows.scale


def fp8_linear_reference(x: Tensor, weight: Fp8Rows, bias: Tensor | None = None) -> Tensor:
    """x W^T + b with x and W rounded to e4m3, a scale for each row of x and each output channel.

    Args:
        x: (..., K), any floating dtype.
        weight: (N, K) from `quantize_rows`.
        bias: (N,), not quantised.

    Returns:
        (..., N), dtype of `x`; sums are float32.
    """
    rows = quantize_rows(x.reshape(-1, x.shape[-1]))
    product = F.linear(rows.values.float(), weight.values.float()) * rows.scale * weight.scale.t()  # (M, N)
    if bias is not None:
        product = product + bias.float()
    return product.to(x.dtype).reshape(*x.shape[:-1], -1)
