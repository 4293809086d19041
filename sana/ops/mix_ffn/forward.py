"""Triton forward kernels of the Mix-FFN and their launchers. Input checks, autograd and gradients are not here.

Three steps on tokens of shape (rows, channels), rows = B * H * W, channels last throughout:

1. `expand`: z = x W^T + b and a = silu(z) (or value * silu(gate) of z's halves) in one GEMM with an epilogue;
2. `depthwise`: the 3x3 convolution of both halves, its bias and value * silu(gate) (or silu alone) in one kernel;
3. the projection, a plain GEMM that torch's own linear does well.

What must move and be computed, with R = rows, s = bytes an element (bounds, not measurements):

| step | FLOPs | bytes |
|---|---|---|
| expand | 4 R D M | s (R D + 2 D M + 2 R M), and 2 s R M more for z if it is kept |
| depthwise | about 50 R M | s (3 R M): 2 R M read, R M written |
| projection | 2 R M D' | s (R M + M D' + R D') |

At D = 1152, M = 2880, R = 2048, bfloat16: 27.2, 0.3 and 13.6 GFLOP; 41.6, 35.4 and 23.2 MB. The convolutions are bound
by bandwidth, the GEMMs by arithmetic. Separate activation, convolution and gate would move 10 s R M bytes more.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sana.ops.mix_ffn.plan import Gemm, Tile


@triton.jit
def silu(x):
    """x * sigmoid(x) in float32."""
    return x * tl.sigmoid(x)


@triton.jit
def load_taps(image, row, limit, columns, channels, width, stride, fits):
    """Returns (left, middle, right): neighbours of `columns` in a row, zero outside the grid and from `limit` on."""
    at = image + tl.cast(row, tl.int64) * (width * stride) + channels[None, :]
    fits = fits & (row >= 0) & (row < limit)
    column = columns[:, None]
    left = tl.load(at + (column - 1) * stride, mask=fits & (column >= 1) & (column <= width), other=0.0)
    middle = tl.load(at + column * stride, mask=fits & (column < width), other=0.0)
    right = tl.load(at + (column + 1) * stride, mask=fits & (column + 1 < width), other=0.0)
    return left, middle, right


@triton.jit
def widen(taps):
    """The three neighbours as float32."""
    return taps[0].to(tl.float32), taps[1].to(tl.float32), taps[2].to(tl.float32)


@triton.jit
def open_window(image, first, limit, columns, channels, width, stride, fits):
    """Returns what a program holds before row `first`: two rows as float32, and two more that are on their way.

    A row is asked for two rows before it is used: each row would otherwise wait for as long as a load takes.
    """
    above = widen(load_taps(image, first - 1, limit, columns, channels, width, stride, fits))
    here = widen(load_taps(image, first, limit, columns, channels, width, stride, fits))
    soon = load_taps(image, first + 1, limit, columns, channels, width, stride, fits)
    later = load_taps(image, first + 2, limit, columns, channels, width, stride, fits)
    return above, here, soon, later


@triton.jit
def load_kernel(weight, channels, stride, hidden):
    """Returns the nine taps of every channel, (1, channels) each, from a (9, stride) tensor, row by row."""
    at = weight + channels[None, :]
    fits = channels[None, :] < hidden
    w0 = tl.load(at, mask=fits, other=0.0).to(tl.float32)
    w1 = tl.load(at + stride, mask=fits, other=0.0).to(tl.float32)
    w2 = tl.load(at + 2 * stride, mask=fits, other=0.0).to(tl.float32)
    w3 = tl.load(at + 3 * stride, mask=fits, other=0.0).to(tl.float32)
    w4 = tl.load(at + 4 * stride, mask=fits, other=0.0).to(tl.float32)
    w5 = tl.load(at + 5 * stride, mask=fits, other=0.0).to(tl.float32)
    w6 = tl.load(at + 6 * stride, mask=fits, other=0.0).to(tl.float32)
    w7 = tl.load(at + 7 * stride, mask=fits, other=0.0).to(tl.float32)
    w8 = tl.load(at + 8 * stride, mask=fits, other=0.0).to(tl.float32)
    return w0, w1, w2, w3, w4, w5, w6, w7, w8


@triton.jit
def load_bias(bias, channels, hidden, HAS_BIAS: tl.constexpr):
    """Returns the bias of every channel as (1, channels) float32, zero without one."""
    value = tl.zeros((1, channels.shape[0]), tl.float32)
    if HAS_BIAS:
        value = tl.load(bias + channels[None, :], mask=channels[None, :] < hidden, other=0.0).to(tl.float32)
    return value


@triton.jit
def convolve(w, above, here, below, start):
    """Returns start + the sum of nine taps times nine weights, always in the same order."""
    total = start + w[0] * above[0] + w[1] * above[1] + w[2] * above[2]
    total += w[3] * here[0] + w[4] * here[1] + w[5] * here[2]
    total += w[6] * below[0] + w[7] * below[1] + w[8] * below[2]
    return total


@triton.jit
def locate(height, width, hidden, ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns (image, strip, first row, columns, channels) of this program; channels run fastest, then strips."""
    blocks = tl.cdiv(hidden, BLOCK_C)
    across = tl.cdiv(width, BLOCK_W)
    strips = tl.cdiv(height, ROWS) * across
    strip = tl.program_id(0) // blocks
    place = strip % strips
    columns = place % across * BLOCK_W + tl.arange(0, BLOCK_W)
    channels = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return (strip // strips).to(tl.int64), strip, place // across * ROWS, columns, channels


@triton.jit
def expand_kernel(
    x,
    weight,
    bias,
    pre,
    out,
    rows,
    columns,
    inner,
    x_stride,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    GLU: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out = silu(x W^T + b) of width `columns`; with GLU, W has 2 * columns rows and out = value * silu(gate)."""
    down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    first = tl.program_id(0) // (GROUP * across) * GROUP
    group = tl.minimum(down - first, GROUP)
    place = tl.program_id(0) % (GROUP * across)
    m = ((first + place % group) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = place // group * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = tl.minimum(n, columns - 1)  # what lies outside repeats the edge: no mask in the loop, none is stored
    x_at = x + tl.minimum(m, rows - 1)[:, None] * x_stride + k[None, :]
    w_at = weight + inside[None, :] * inner + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, inner, BLOCK_K):
        left = inner if EVEN_K else inner - start
        tokens = tl.load(x_at) if EVEN_K else tl.load(x_at, mask=k[None, :] < left, other=0.0)
        block = tl.load(w_at) if EVEN_K else tl.load(w_at, mask=k[:, None] < left, other=0.0)
        total = tl.dot(tokens, block, total, input_precision="ieee")
        if GLU:
            second = w_at + columns * inner
            block = tl.load(second) if EVEN_K else tl.load(second, mask=k[:, None] < left, other=0.0)
            gate = tl.dot(tokens, block, gate, input_precision="ieee")
        x_at += BLOCK_K
        w_at += BLOCK_K
    fits = (m < rows)[:, None] & (n < columns)[None, :]
    pre_stride = 2 * columns if GLU else columns
    at = pre + m[:, None] * pre_stride + n[None, :]
    if HAS_BIAS:
        total += tl.load(bias + inside).to(tl.float32)[None, :]
    total = total.to(out.dtype.element_ty)  # rounded before the activation: what is kept gives the same bits again
    if KEEP:
        tl.store(at, total, mask=fits)
    result = total.to(tl.float32)
    if GLU:
        if HAS_BIAS:
            gate += tl.load(bias + columns + inside).to(tl.float32)[None, :]
        gate = gate.to(out.dtype.element_ty)
        if KEEP:
            tl.store(at + columns, gate, mask=fits)
        result = result * silu(gate.to(tl.float32))
    else:
        result = silu(result)
    tl.store(out + m[:, None] * columns + n[None, :], result.to(out.dtype.element_ty), mask=fits)


@triton.jit
def activate_kernel(pre, out, rows, columns, GLU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """out = silu(pre), or value * silu(gate) of pre's halves: the epilogue of `expand_kernel` on its own."""
    blocks = tl.cdiv(columns, BLOCK_N)
    m = (tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    n = (tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    fits = (m < rows) & (n < columns)
    at = pre + m * (2 * columns if GLU else columns) + n
    result = tl.load(at, mask=fits, other=0.0).to(tl.float32)
    if GLU:
        result = result * silu(tl.load(at + columns, mask=fits, other=0.0).to(tl.float32))
    else:
        result = silu(result)
    tl.store(out + m * columns + n, result.to(out.dtype.element_ty), mask=fits)


@triton.jit
def depthwise_kernel(
    x,
    weight,
    bias,
    out,
    height,
    width,
    hidden,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = value * silu(gate) of the convolved halves; without GATED, silu of the convolution of `hidden` channels.

    Rows stay in registers while the program slides down, so that a value is loaded three times (left, middle, right)
    and not nine; two of the three hit the first-level cache.
    """
    image, _, first, columns, channels = locate(height, width, hidden, ROWS, BLOCK_W, BLOCK_C)
    stride = 2 * hidden if GATED else hidden
    fits = (channels < hidden)[None, :]
    x += image * height * width * stride
    out += image * height * width * hidden
    w = load_kernel(weight, channels, stride, hidden)
    b = load_bias(bias, channels, hidden, HAS_BIAS)
    last = tl.minimum(first + ROWS, height)
    limit = tl.minimum(last + 1, height)
    above, here, soon, later = open_window(x, first, limit, columns, channels, width, stride, fits)
    if GATED:
        w_gate = load_kernel(weight + hidden, channels, stride, hidden)
        b_gate = load_bias(bias + hidden, channels, hidden, HAS_BIAS)
        gate = open_window(x + hidden, first, limit, columns, channels, width, stride, fits)
    for row in range(first, last):
        new = load_taps(x, row + 3, limit, columns, channels, width, stride, fits)
        if GATED:
            new_gate = load_taps(x + hidden, row + 3, limit, columns, channels, width, stride, fits)
        below = widen(soon)
        value = convolve(w, above, here, below, b)
        above, here, soon, later = here, below, later, new
        if GATED:
            below_gate = widen(gate[2])
            value *= silu(convolve(w_gate, gate[0], gate[1], below_gate, b_gate))
            gate = gate[1], below_gate, gate[3], new_gate
        else:
            value = silu(value)
        at = out + tl.cast(row, tl.int64) * (width * hidden) + columns[:, None] * hidden + channels[None, :]
        tl.store(at, value.to(out.dtype.element_ty), mask=fits & (columns < width)[:, None])


def expand(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, glu: bool, keep: bool, plan: Gemm | None
) -> tuple[Tensor, Tensor | None]:
    """Computes the activated expansion, and keeps the expansion itself if asked to.

    Args:
        x: (R, D), the last axis contiguous.
        weight: (2M, D), contiguous.
        bias: (2M,) or None.
        glu: value * silu(gate) of width M instead of silu of width 2M.
        keep: also return the expansion before the activation.
        plan: block shape, or None for the library's GEMM and a pointwise kernel; the results differ by rounding only.

    Returns:
        (R, 2M or M) activated, and (R, 2M) before the activation or None.
    """
    if plan is None:
        pre = F.linear(x, weight, bias)
        return activate(pre, glu), pre if keep else None
    rows, inner = x.shape
    wide = weight.shape[0]
    columns = wide // 2 if glu else wide
    out = x.new_empty(rows, columns)
    pre = x.new_empty(rows, wide) if keep else None
    block_n = plan.block_n // 2 if glu and plan.block_n > 16 else plan.block_n
    grid = (triton.cdiv(rows, plan.block_m) * triton.cdiv(columns, block_n),)
    with torch.cuda.device_of(x):
        launcher: Any = expand_kernel[grid]
        launcher(
            x,
            weight,
            weight if bias is None else bias,
            out if pre is None else pre,
            out,
            rows,
            columns,
            inner,
            x.stride(0),
            HAS_BIAS=bias is not None,
            KEEP=keep,
            GLU=glu,
            EVEN_K=inner % plan.block_k == 0,
            BLOCK_M=plan.block_m,
            BLOCK_N=block_n,
            BLOCK_K=plan.block_k,
            GROUP=plan.group,
            num_warps=plan.warps,
            num_stages=plan.stages,
        )
    return out, pre


def activate(pre: Tensor, glu: bool) -> Tensor:
    """silu of a contiguous (R, 2M), or value * silu(gate) of its halves: (R, M)."""
    rows, wide = pre.shape
    columns = wide // 2 if glu else wide
    out = pre.new_empty(rows, columns)
    block_m, block_n = 8, 128
    grid = (triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n),)
    with torch.cuda.device_of(pre):
        activate_kernel[grid](pre, out, rows, columns, GLU=glu, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4)
    return out


def depthwise(
    x: Tensor, size: tuple[int, int], weight: Tensor, bias: Tensor | None, *, gated: bool, tile: Tile
) -> Tensor:
    """Convolves every channel with its 3x3 kernel, then value * silu(gate), or silu if not gated.

    Args:
        x: (R, C) contiguous, R = B * H * W.
        size: (H, W).
        weight: (9, C) contiguous, taps row by row.
        bias: (C,) or None.
        gated: the channels are value and gate halves.
        tile: block shape.

    Returns:
        (R, C / 2) if gated, else (R, C).
    """
    height, width = size
    hidden = x.shape[1] // 2 if gated else x.shape[1]
    out = x.new_empty(x.shape[0], hidden)
    with torch.cuda.device_of(x):
        depthwise_kernel[(programs(x.shape[0], size, hidden, tile),)](
            x,
            weight,
            weight if bias is None else bias,
            out,
            height,
            width,
            hidden,
            HAS_BIAS=bias is not None,
            GATED=gated,
            ROWS=tile.rows,
            BLOCK_W=tile.columns,
            BLOCK_C=tile.channels,
            num_warps=tile.warps,
        )
    return out


def strips(rows: int, size: tuple[int, int], tile: Tile) -> int:
    """Returns how many strips of a tile cover a batch of images."""
    height, width = size
    return rows // (height * width) * triton.cdiv(height, tile.rows) * triton.cdiv(width, tile.columns)


def programs(rows: int, size: tuple[int, int], hidden: int, tile: Tile) -> int:
    """Returns how many programs a depthwise kernel has: strips times blocks of channels."""
    return strips(rows, size, tile) * triton.cdiv(hidden, tile.channels)
