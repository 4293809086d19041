"""Triton forward kernels of adaLN and their launchers. Input checks, autograd and gradients are not here.

Both kernels are limited by bandwidth. With s bytes an element they move, per token of width D, 2 s D (modulated
LayerNorm: one read, one write) and 3 s D (gated residual: two reads, one write); the tables of a row stay in cache.

A program handles one token, or a few tokens of one image, so an image's result does not depend on its batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

GATE_ROWS = 8


@triton.jit
def layer_norm_kernel(
    x, shift, scale, out, moments, tokens, width, eps,
    x_image, x_token, shift_image, scale_image, BLOCK: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    token, image = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = image * tokens + token
    column = tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(x + image * x_image + token * x_token + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, axis=0) / width
    centred = tl.where(inside, values - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)
    factor = 1.0 + tl.load(scale + image * scale_image + column, mask=inside, other=0.0).to(tl.float32)
    term = tl.load(shift + image * shift_image + column, mask=inside, other=0.0).to(tl.float32)
    result = centred * rstd * factor + term
    tl.store(out + row * width + column, result.to(out.dtype.element_ty), mask=inside)
    if SAVE:
        tl.store(moments + 2 * row, mean)
        tl.store(moments + 2 * row + 1, rstd)


@triton.jit
def gated_residual_kernel(
    x, gate, y, out, tokens, width, x_image, x_token, y_image, y_token, gate_image,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (token < tokens) & (column < width)
    factor = tl.load(gate + image * gate_image + column, mask=column < width, other=0.0).to(tl.float32)
    base = tl.load(x + image * x_image + token * x_token + column, mask=inside, other=0.0).to(tl.float32)
    branch = tl.load(y + image * y_image + token * y_token + column, mask=inside, other=0.0).to(tl.float32)
    result = base + factor * branch
    tl.store(out + (image * tokens + token) * width + column, result.to(out.dtype.element_ty), mask=inside)


def row_warps(block: int) -> int:
    """Warps for a program that holds one token of `block` columns: 16 values a thread, 1 to 16 warps."""
    return min(max(block // 512, 1), 16)


def gate_block(width: int) -> int:
    """Columns of one tile of the gated residual."""
    return min(triton.next_power_of_2(width), 512)


def launch_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float, save: bool) -> tuple[Tensor, Tensor]:
    """Runs the modulated LayerNorm.

    Args:
        x: (B, N, D), last axis dense.
        shift: (B, 1, D), last axis dense, any stride of the batch.
        scale: the same.
        eps: added to the variance.
        save: also return what the backward pass needs.

    Returns:
        (B, N, D) contiguous, dtype of `x`, and (B, N, 2) float32 mean and 1 / deviation of every token (empty unless
        saved).
    """
    images, tokens, width = x.shape
    out = torch.empty((images, tokens, width), dtype=x.dtype, device=x.device)
    moments = torch.empty((images, tokens, 2) if save else (0,), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    layer_norm_kernel[(tokens, images)](
        x, shift, scale, out, moments, tokens, width, eps,
        x.stride(0), x.stride(1), shift.stride(0), scale.stride(0),
        BLOCK=block, SAVE=save, num_warps=row_warps(block),
    )  # fmt: skip
    return out, moments


def launch_gated_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """Runs x + gate * y; (B, N, D), (B, 1, D), (B, N, D), last axes dense -> (B, N, D) contiguous, dtype of `x`."""
    images, tokens, width = x.shape
    out = torch.empty((images, tokens, width), dtype=x.dtype, device=x.device)
    block = gate_block(width)
    gated_residual_kernel[(triton.cdiv(tokens, GATE_ROWS), triton.cdiv(width, block), images)](
        x, gate, y, out, tokens, width, x.stride(0), x.stride(1), y.stride(0), y.stride(1), gate.stride(0),
        ROWS=GATE_ROWS, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out
