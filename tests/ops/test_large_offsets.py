"""Addresses beyond 2^31 elements, as large images and batches have them: every kernel finds its numbers there.

The memory lies so far apart by its strides alone, and only the pages that are touched exist.
"""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from sana.ops.linear_attention.function import linear_attention_triton
from sana.ops.linear_attention.reference import linear_attention_reference
from sana.ops.mix_ffn.forward import load_taps
from sana.ops.modulation.function import gated_residual_triton, modulated_layer_norm_triton
from sana.ops.modulation.reference import gated_residual_reference, modulated_layer_norm_reference
from sana.ops.rms_norm.forward import launch_rms_norm
from sana.ops.rms_norm.reference import rms_norm_2d
from tests.ops.kernels import DEVICE
from tests.tolerance import assert_rms_close

FAR = 2**31 + 64  # elements between two images: a 32-bit product of them is negative, or that of a near place


def far_apart(values: Tensor, axis: int, stride: int) -> Tensor:
    """The same values, `stride` elements apart along an axis and dense along the others."""
    strides = list(values.stride())
    strides[axis] = stride
    reach = sum((size - 1) * step for size, step in zip(values.shape, strides, strict=True)) + 1
    memory = torch.empty(reach, dtype=values.dtype, device=values.device)
    out = memory.as_strided(values.shape, strides)
    out.copy_(values)
    return out


def test_linear_attention_of_the_second_image() -> None:
    qkv = torch.randn(2, 20, 3 * 32, device=DEVICE).half()
    expected = linear_attention_reference(qkv, 2)
    assert_rms_close(linear_attention_triton(far_apart(qkv, 0, FAR), 2), expected)
    weights = {"q_weight": torch.rand(32, device=DEVICE).half(), "k_weight": torch.rand(32, device=DEVICE).half()}
    expected = linear_attention_reference(qkv, 2, **weights)
    assert_rms_close(linear_attention_triton(far_apart(qkv, 0, FAR), 2, **weights), expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_modulation_of_the_last_image_and_token(axis: int) -> None:
    x, y = torch.randn(2, 2, 3, 24, device=DEVICE).half()
    shift, scale = torch.randn(2, 2, 1, 24, device=DEVICE).half()
    far = far_apart(x, axis, FAR)
    expected = modulated_layer_norm_reference(x, shift, scale)
    assert_rms_close(modulated_layer_norm_triton(far, shift, scale), expected)
    assert_rms_close(gated_residual_triton(far, scale, y), gated_residual_reference(x, scale, y))
    assert_rms_close(gated_residual_triton(y, scale, far), gated_residual_reference(y, scale, x))


@pytest.mark.parametrize("axis", [0, 1])
def test_rms_norm_of_the_last_image_and_channel(axis: int) -> None:
    """128 channels of 4096 x 4096 pixels are 2^31 elements."""
    x = torch.randn(2, 5, 2, 3, device=DEVICE).half()
    weight = torch.randn(5, device=DEVICE).half()
    far = far_apart(x, axis, FAR if axis == 0 else 2**29 + 8)
    out, _ = launch_rms_norm(far, weight, None, 1e-5, "relu", False)
    assert_rms_close(out, rms_norm_2d(x, weight, None, 1e-5, "relu"))


@triton.jit
def row_kernel(image, out, row, width, stride, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):
    columns, channels = tl.arange(0, COLUMNS), tl.arange(0, CHANNELS)
    fits = (channels < CHANNELS)[None, :]
    left, middle, right = load_taps(image, row, row + 1, columns, channels, width, stride, fits)
    at = out + columns[:, None] * CHANNELS + channels[None, :]
    tl.store(at, left)
    tl.store(at + COLUMNS * CHANNELS, middle)
    tl.store(at + 2 * COLUMNS * CHANNELS, right)


def test_rows_of_the_mix_ffn_beyond_32_bits() -> None:
    """The last row of a grid of 512 x 512 tokens (16384 px) that are 11200 wide (1.6B)."""
    height, width, stride, columns, channels = 512, 512, 11200, 4, 16
    image = torch.empty(height * width * stride, dtype=torch.float16, device=DEVICE)
    place = (height - 1) * width * stride
    row = image[place : place + columns * stride].view(columns, stride)[:, :channels]
    row.copy_(torch.randn(columns, channels))
    after = image[place + columns * stride : place + columns * stride + channels].normal_()
    out = torch.empty(3, columns, channels, dtype=torch.float16, device=DEVICE)
    row_kernel[(1,)](image, out, height - 1, width, stride, COLUMNS=columns, CHANNELS=channels)
    assert torch.equal(out[1], row)
    assert torch.equal(out[0], torch.cat([torch.zeros_like(row[:1]), row[:-1]]))
    assert torch.equal(out[2], torch.cat([row[1:], after[None]]))
