"""Triton forward kernel of the RMS norm of image channels, with the activation that follows, and its launcher.

One kernel serves both memory layouts: a program takes a few pixels of one image with all their channels. With channels
last in memory a tile is a run of channels and the pixels are few; otherwise it is a run of pixels and the channels come
in steps. Limited by bandwidth: 2 s C bytes a pixel for s bytes an element, where all channels fit one tile or the
second read comes from cache.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

FULL_TILE = 4096  # elements of a tile that holds all channels
ACTIVATIONS = {None: 0, "silu": 1, "relu": 2}


@dataclass(frozen=True)
class Tile:
    """Block sizes of one launch, a plain function of the channels and the layout.

    Args:
        pixels: of one program, a power of two.
        channels: of one step, a power of two.
        whole: whether all channels are in one step, so that they are read once.
    """

    pixels: int
    channels: int
    whole: bool


def choose_tile(channels: int, channels_last: bool, *, backward: bool = False) -> Tile:
    """Returns the block sizes for an image of so many channels.

    Args:
        channels: C.
        channels_last: how the image lies in memory.
        backward: the backward pass holds two tensors and writes a row of partial sums a program, so its tiles have
            32 pixels or more.
    """
    padded = triton.next_power_of_2(channels)
    if channels_last:
        step = min(padded, 128 if backward else FULL_TILE)
        pixels = max(1, FULL_TILE // step)
        return Tile(min(pixels, 64), step, step >= channels)
    step = min(padded, 32)
    return Tile(128, step, step >= channels)


@triton.jit
def activate(z, ACT: tl.constexpr):
    if ACT == 1:
        z = z / (1.0 + tl.exp(-z))
    if ACT == 2:
        z = tl.maximum(z, 0.0)
    return z


@triton.jit
def affine(normed, weight, bias, channel, channels, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    """normed * weight + bias for a tile (pixels, channels) and the numbers of its channels (channels,)."""
    if HAS_WEIGHT:
        normed = normed * tl.load(weight + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        normed = normed + tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    return normed


@triton.jit
def rms_norm_kernel(
    x, weight, bias, out, scale, pixels, channels, eps, x_image, x_channel, x_pixel, out_image, out_channel, out_pixel,
    PIXELS: tl.constexpr, STEP: tl.constexpr, WHOLE: tl.constexpr, ACT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    known = pixel < pixels
    source = x + image * x_image + pixel[:, None] * x_pixel
    target = out + image * out_image + pixel[:, None] * out_pixel
    channel = tl.arange(0, STEP)
    if WHOLE:
        mask = known[:, None] & (channel < channels)[None, :]
        values = tl.load(source + channel.to(tl.int64)[None, :] * x_channel, mask=mask, other=0.0).to(tl.float32)
        rstd = 1.0 / tl.sqrt(tl.sum(values * values, axis=1) / channels + eps)
        result = affine(values * rstd[:, None], weight, bias, channel, channels, HAS_WEIGHT, HAS_BIAS)
        result = activate(result, ACT).to(out.dtype.element_ty)
        tl.store(target + channel.to(tl.int64)[None, :] * out_channel, result, mask=mask)
    else:
        squares = tl.zeros((PIXELS,), dtype=tl.float32)
        for first in range(0, channels, STEP):
            place = first + channel
            mask = known[:, None] & (place < channels)[None, :]
            values = tl.load(source + place.to(tl.int64)[None, :] * x_channel, mask=mask, other=0.0).to(tl.float32)
            squares += tl.sum(values * values, axis=1)
        rstd = 1.0 / tl.sqrt(squares / channels + eps)
        for first in range(0, channels, STEP):
            place = first + channel
            mask = known[:, None] & (place < channels)[None, :]
            values = tl.load(source + place.to(tl.int64)[None, :] * x_channel, mask=mask, other=0.0).to(tl.float32)
            result = affine(values * rstd[:, None], weight, bias, place, channels, HAS_WEIGHT, HAS_BIAS)
            result = activate(result, ACT).to(out.dtype.element_ty)
            tl.store(target + place.to(tl.int64)[None, :] * out_channel, result, mask=mask)
    if SAVE:
        tl.store(scale + image * pixels + pixel, rstd, mask=known)


def flat_strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of image, channel and pixel of (B, C, H, W) whose pixels lie evenly, see `function.layout`."""
    return x.stride(0), x.stride(1), x.stride(3) if x.shape[3] > 1 else x.stride(2)


def launch_rms_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, act: str | None, save: bool
) -> tuple[Tensor, Tensor]:
    """Runs the norm and the activation.

    Args:
        x: (B, C, H, W), contiguous or channels last in memory.
        weight: (C,) contiguous, or None.
        bias: (C,) contiguous, or None.
        eps: added to the mean square.
        act: None, "silu" or "relu".
        save: also return what the backward pass needs.

    Returns:
        The result, dtype and layout of `x`, and (B, H * W) float32 1 / RMS of every pixel (empty unless saved).
    """
    images, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    out = torch.empty_like(x)
    scale = torch.empty((images, pixels) if save else (0,), dtype=torch.float32, device=x.device)
    tile = choose_tile(channels, not x.is_contiguous())
    rms_norm_kernel[(triton.cdiv(pixels, tile.pixels), images)](
        x, x if weight is None else weight, x if bias is None else bias, out, scale, pixels, channels, eps,
        *flat_strides(x), *flat_strides(out),
        PIXELS=tile.pixels, STEP=tile.channels, WHOLE=tile.whole, ACT=ACTIVATIONS[act],
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, SAVE=save, num_warps=4,
    )  # fmt: skip
    return out, scale
