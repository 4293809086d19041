"""Triton backward kernels of the Mix-FFN and their launchers. The forward pass and autograd are not here.

From the gradient d of the projection's input, in tokens of shape (rows, channels):

1. `gate_backward` convolves the activated expansion a again (reading it costs less than keeping the convolution), and
   gives the projection's input, the gradient of the convolution, and partial sums of its weights' and bias's gradients;
2. `input_backward` convolves that gradient with the turned-round kernels and multiplies by the derivative of the
   expansion's activation, with partial sums of the expansion's bias gradient;
3. the GEMMs' gradients are torch's own matmul.

Sums over tokens run in float32 in a fixed order: down a strip, across it, then over strips (torch.sum): no atomics.

Bytes that must move (bounds, not measurements), R = rows, s = bytes an element, two halves: `gate_backward` reads and
writes s (3 + 3) R M, `input_backward` s (4 + 2) R M, making a from z again s (2 + 2) R M; about 200 R M FLOPs in all.
At M = 2880, R = 2048, bfloat16: 71, 71 and 47 MB beside GEMMs of 82 GFLOP (109 if z is computed again). The partial
sums add 40 bytes a channel and strip: 40 / 256 a token at 32 x 32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana.ops.mix_ffn.forward import (
    convolve,
    load_bias,
    load_kernel,
    load_taps,
    locate,
    open_window,
    programs,
    silu,
    strips,
    widen,
)
from sana.ops.mix_ffn.plan import Tile

SUMS = 10  # partial sums a channel and strip: nine taps and the bias


@triton.jit
def silu_slope(x):
    """Derivative of x * sigmoid(x)."""
    sigmoid = tl.sigmoid(x)
    return sigmoid * (1.0 + x * (1.0 - sigmoid))


@triton.jit
def add_products(sums, gradient, above, here, below):
    """Adds gradient times tap to nine sums, and the gradient itself to the tenth."""
    return (
        sums[0] + gradient * above[0],
        sums[1] + gradient * above[1],
        sums[2] + gradient * above[2],
        sums[3] + gradient * here[0],
        sums[4] + gradient * here[1],
        sums[5] + gradient * here[2],
        sums[6] + gradient * below[0],
        sums[7] + gradient * below[1],
        sums[8] + gradient * below[2],
        sums[9] + gradient,
    )


@triton.jit
def store_sums(at, sums, stride, fits):
    """Adds ten sums across the columns of a strip and stores them `stride` apart."""
    tl.store(at, tl.sum(sums[0], 0), mask=fits)
    tl.store(at + stride, tl.sum(sums[1], 0), mask=fits)
    tl.store(at + 2 * stride, tl.sum(sums[2], 0), mask=fits)
    tl.store(at + 3 * stride, tl.sum(sums[3], 0), mask=fits)
    tl.store(at + 4 * stride, tl.sum(sums[4], 0), mask=fits)
    tl.store(at + 5 * stride, tl.sum(sums[5], 0), mask=fits)
    tl.store(at + 6 * stride, tl.sum(sums[6], 0), mask=fits)
    tl.store(at + 7 * stride, tl.sum(sums[7], 0), mask=fits)
    tl.store(at + 8 * stride, tl.sum(sums[8], 0), mask=fits)
    tl.store(at + 9 * stride, tl.sum(sums[9], 0), mask=fits)


@triton.jit
def gate_backward_kernel(
    x,
    weight,
    bias,
    d_out,
    out,
    d_conv,
    partial,
    height,
    width,
    hidden,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Backward of `depthwise_kernel` up to the convolution's output; x, out: as there; partial: (strips, 10, C)."""
    image, strip, first, columns, channels = locate(height, width, hidden, ROWS, BLOCK_W, BLOCK_C)
    stride = 2 * hidden if GATED else hidden
    fits = (channels < hidden)[None, :]
    narrow, wide = image * height * width * hidden, image * height * width * stride
    x += wide
    w = load_kernel(weight, channels, stride, hidden)
    b = load_bias(bias, channels, hidden, HAS_BIAS)
    zero = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    sums = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
    last = tl.minimum(first + ROWS, height)
    limit = tl.minimum(last + 1, height)
    above, here, soon, later = open_window(x, first, limit, columns, channels, width, stride, fits)
    if GATED:
        w_gate = load_kernel(weight + hidden, channels, stride, hidden)
        b_gate = load_bias(bias + hidden, channels, hidden, HAS_BIAS)
        sums_gate = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
        taps = open_window(x + hidden, first, limit, columns, channels, width, stride, fits)
    for row in range(first, last):
        inside = fits & (columns < width)[:, None]
        token = (tl.cast(row, tl.int64) * width + columns)[:, None]
        at = narrow + token * hidden + channels[None, :]
        at_wide = d_conv + wide + token * stride + channels[None, :]
        gradient = tl.load(d_out + at, mask=inside, other=0.0).to(tl.float32)
        new = load_taps(x, row + 3, limit, columns, channels, width, stride, fits)
        below = widen(soon)
        value = convolve(w, above, here, below, b)
        if GATED:
            new_gate = load_taps(x + hidden, row + 3, limit, columns, channels, width, stride, fits)
            below_gate = widen(taps[2])
            gate = convolve(w_gate, taps[0], taps[1], below_gate, b_gate)
            d_gate = tl.where(inside, gradient * value * silu_slope(gate), 0.0)
            d_value = tl.where(inside, gradient * silu(gate), 0.0)
            value *= silu(gate)
            tl.store(at_wide + hidden, d_gate.to(d_conv.dtype.element_ty), mask=inside)
            sums_gate = add_products(sums_gate, d_gate, taps[0], taps[1], below_gate)
            taps = taps[1], below_gate, taps[3], new_gate
        else:
            d_value = tl.where(inside, gradient * silu_slope(value), 0.0)
            value = silu(value)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)
        tl.store(at_wide, d_value.to(d_conv.dtype.element_ty), mask=inside)
        sums = add_products(sums, d_value, above, here, below)
        above, here, soon, later = here, below, later, new
    at_sums = partial + strip.to(tl.int64) * 10 * stride + channels
    store_sums(at_sums, sums, stride, channels < hidden)
    if GATED:
        store_sums(at_sums + hidden, sums_gate, stride, channels < hidden)


@triton.jit
def input_backward_kernel(
    d_conv,
    weight,
    pre,
    d_pre,
    partial,
    height,
    width,
    hidden,
    PRE_GLU: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """d_pre = (d_conv convolved with the turned-round kernels) * the activation's derivative at pre.

    d_conv has `hidden` channels; the activation is silu, or with PRE_GLU value * silu(gate) of pre's 2 * hidden.
    """
    image, strip, first, columns, channels = locate(height, width, hidden, ROWS, BLOCK_W, BLOCK_C)
    stride = 2 * hidden if PRE_GLU else hidden
    fits = (channels < hidden)[None, :]
    wide = image * height * width * stride
    d_conv += image * height * width * hidden
    w0, w1, w2, w3, w4, w5, w6, w7, w8 = load_kernel(weight, channels, hidden, hidden)
    turned = (w8, w7, w6, w5, w4, w3, w2, w1, w0)
    zero = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    total, total_gate = zero, zero
    last = tl.minimum(first + ROWS, height)
    limit = tl.minimum(last + 1, height)
    above, here, soon, later = open_window(d_conv, first, limit, columns, channels, width, hidden, fits)
    for row in range(first, last):
        inside = fits & (columns < width)[:, None]
        at = wide + (tl.cast(row, tl.int64) * width + columns)[:, None] * stride + channels[None, :]
        value = tl.load(pre + at, mask=inside, other=0.0).to(tl.float32)
        new = load_taps(d_conv, row + 3, limit, columns, channels, width, hidden, fits)
        below = widen(soon)
        gradient = tl.where(inside, convolve(turned, above, here, below, zero), 0.0)
        if PRE_GLU:
            gate = tl.load(pre + at + hidden, mask=inside, other=0.0).to(tl.float32)
            d_gate = gradient * value * silu_slope(gate)
            gradient *= silu(gate)
            total_gate += d_gate
            tl.store(d_pre + at + hidden, d_gate.to(d_pre.dtype.element_ty), mask=inside)
        else:
            gradient *= silu_slope(value)
        total += gradient
        tl.store(d_pre + at, gradient.to(d_pre.dtype.element_ty), mask=inside)
        above, here, soon, later = here, below, later, new
    at_sums = partial + strip.to(tl.int64) * stride + channels
    tl.store(at_sums, tl.sum(total, 0), mask=channels < hidden)
    if PRE_GLU:
        tl.store(at_sums + hidden, tl.sum(total_gate, 0), mask=channels < hidden)


def gate_backward(
    x: Tensor,
    size: tuple[int, int],
    weight: Tensor,
    bias: Tensor | None,
    d_out: Tensor,
    *,
    gated: bool,
    tile: Tile,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of `depthwise` up to the convolution's output.

    Args:
        x, size, weight, bias, gated, tile: as for `depthwise`.
        d_out: gradient of its result, contiguous.

    Returns:
        Its result again, the convolution's gradient (R, C), and the gradients of weight and bias (10, C) in float32.
    """
    rows, wide = x.shape
    hidden = d_out.shape[1]
    out, d_conv = torch.empty_like(d_out), torch.empty_like(x)
    partial = x.new_empty(strips(rows, size, tile), SUMS, wide, dtype=torch.float32)
    with torch.cuda.device_of(x):
        gate_backward_kernel[(programs(rows, size, hidden, tile),)](
            x,
            weight,
            weight if bias is None else bias,
            d_out,
            out,
            d_conv,
            partial,
            *size,
            hidden,
            HAS_BIAS=bias is not None,
            GATED=gated,
            ROWS=tile.rows,
            BLOCK_W=tile.columns,
            BLOCK_C=tile.channels,
            num_warps=tile.warps,
        )
    return out, d_conv, partial.sum(0)


def input_backward(
    d_conv: Tensor, size: tuple[int, int], weight: Tensor, pre: Tensor, *, pre_glu: bool, tile: Tile
) -> tuple[Tensor, Tensor]:
    """Gradient of the expansion from the gradient of the depthwise convolution.

    Args:
        d_conv: (R, C) contiguous, R = B * H * W.
        size: (H, W).
        weight: (9, C) contiguous, taps row by row.
        pre: the expansion before its activation, (R, C), or (R, 2C) if pre_glu.
        pre_glu: the activation is value * silu(gate) instead of silu.
        tile: block shape.

    Returns:
        The gradient of pre, and its sum over the tokens in float32.
    """
    rows, hidden = d_conv.shape
    d_pre = torch.empty_like(pre)
    partial = pre.new_empty(strips(rows, size, tile), pre.shape[1], dtype=torch.float32)
    with torch.cuda.device_of(pre):
        input_backward_kernel[(programs(rows, size, hidden, tile),)](
            d_conv,
            weight,
            pre,
            d_pre,
            partial,
            *size,
            hidden,
            PRE_GLU=pre_glu,
            ROWS=tile.rows,
            BLOCK_W=tile.columns,
            BLOCK_C=tile.channels,
            num_warps=tile.warps,
        )
    return d_pre, partial.sum(0)
