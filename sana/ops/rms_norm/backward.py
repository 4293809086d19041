"""Triton backward kernel of the RMS norm of image channels, with the activation's derivative, and its launcher.

With x' = x * rstd, z = x' * weight + bias, h = grad * act'(z) and means over the channels of a pixel:

    grad x = rstd * (h weight - x' mean(h weight x')),  grad weight = sum over pixels of h x',  grad bias = of h

z is computed again instead of kept. Sums over pixels are taken in two steps without atomics, always in the same order:
every program writes one row for its pixels, and PyTorch adds the rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana.ops.rms_norm.forward import ACTIVATIONS, affine, choose_tile, flat_strides


@triton.jit
def load_pair(
    source, given, weight, bias, rstd, place, known, channels, x_channel, grad_channel,
    ACT: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """x' and h, both (pixels, channels) float32 and 0 outside of the image."""
    mask = known[:, None] & (place < channels)[None, :]
    normed = tl.load(source + place.to(tl.int64)[None, :] * x_channel, mask=mask, other=0.0).to(tl.float32)
    normed = normed * rstd[:, None]
    grad = tl.load(given + place.to(tl.int64)[None, :] * grad_channel, mask=mask, other=0.0).to(tl.float32)
    if ACT != 0:
        z = affine(normed, weight, bias, place, channels, HAS_WEIGHT, HAS_BIAS)
        if ACT == 1:
            sigmoid = 1.0 / (1.0 + tl.exp(-z))
            grad = grad * sigmoid * (1.0 + z * (1.0 - sigmoid))
        else:
            grad = tl.where(z > 0, grad, 0.0)
    return normed, grad


@triton.jit
def rms_norm_grad_kernel(
    grad, x, weight, bias, scale, grad_x, parts, pixels, channels,
    grad_image, grad_channel, grad_pixel, x_image, x_channel, x_pixel,
    PIXELS: tl.constexpr, STEP: tl.constexpr, ACT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    known = pixel < pixels
    source = x + image * x_image + pixel[:, None] * x_pixel
    target = grad_x + image * x_image + pixel[:, None] * x_pixel
    given = grad + image * grad_image + pixel[:, None] * grad_pixel
    rstd = tl.load(scale + image * pixels + pixel, mask=known, other=0.0)
    row = parts + (image * tl.num_programs(0) + tl.program_id(0)) * 2 * channels
    channel = tl.arange(0, STEP)
    along = tl.zeros((PIXELS,), dtype=tl.float32)
    for first in range(0, channels, STEP):
        place = first + channel
        normed, wide = load_pair(
            source, given, weight, bias, rstd, place, known, channels, x_channel, grad_channel,
            ACT, HAS_WEIGHT, HAS_BIAS,
        )  # fmt: skip
        product = wide * normed
        tl.store(row + place, tl.sum(product, axis=0), mask=place < channels)
        tl.store(row + channels + place, tl.sum(wide, axis=0), mask=place < channels)
        along += tl.sum(affine(product, weight, bias, place, channels, HAS_WEIGHT, False), axis=1)
    along = along / channels
    for first in range(0, channels, STEP):
        place = first + channel
        normed, wide = load_pair(
            source, given, weight, bias, rstd, place, known, channels, x_channel, grad_channel,
            ACT, HAS_WEIGHT, HAS_BIAS,
        )  # fmt: skip
        wide = affine(wide, weight, bias, place, channels, HAS_WEIGHT, False)
        result = (rstd[:, None] * (wide - normed * along[:, None])).to(grad_x.dtype.element_ty)
        mask = known[:, None] & (place < channels)[None, :]
        tl.store(target + place.to(tl.int64)[None, :] * x_channel, result, mask=mask)


def launch_rms_norm_grad(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor, act: str | None
) -> tuple[Tensor, Tensor]:
    """Gradients of the norm and the activation.

    Args:
        grad: (B, C, H, W), contiguous or channels last in memory.
        x: the same, the forward pass's.
        weight: (C,) or None.
        bias: (C,) or None.
        scale: (B, H * W) from the forward pass.
        act: None, "silu" or "relu".

    Returns:
        Gradient of x, dtype and layout of `x`, and (2, C) float32: gradients of weight and bias.
    """
    images, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    grad_x = torch.empty_like(x)
    tile = choose_tile(channels, not x.is_contiguous(), backward=True)
    programs = triton.cdiv(pixels, tile.pixels)
    parts = torch.empty((images * programs, 2, channels), dtype=torch.float32, device=x.device)
    rms_norm_grad_kernel[(programs, images)](
        grad, x, x if weight is None else weight, x if bias is None else bias, scale, grad_x, parts, pixels, channels,
        *flat_strides(grad), *flat_strides(x),
        PIXELS=tile.pixels, STEP=tile.channels, ACT=ACTIVATIONS[act],
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, num_warps=4,
    )  # fmt: skip
    return grad_x, parts.sum(dim=0)
