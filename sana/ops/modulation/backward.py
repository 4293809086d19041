"""Triton backward kernels of adaLN and their launchers.

With x' = (x - mean) * rstd, g = grad * (1 + scale) and means over the D columns of a token:

    grad x = rstd * (g - mean(g) - x' mean(g x')),  grad scale = sum over tokens of grad x',  grad shift = of grad
    gated residual: grad y = grad * gate,  grad gate = sum over tokens of grad y,  grad x = grad

Sums over tokens are taken in two steps without atomics: every program adds its own tokens of one image in order and
writes one partial row, and PyTorch adds those rows. How tokens are shared out depends on their number alone: two runs
give the same bits, whatever the batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana.ops.modulation.forward import gate_block, row_warps

MAX_PARTS = 128  # programs an image has at most
GATE_TILE = 8


@triton.jit
def layer_norm_grad_kernel(
    grad, x, scale, moments, grad_x, parts, tokens, width, chunk,
    grad_image, grad_token, x_image, x_token, scale_image, BLOCK: tl.constexpr,
):  # fmt: skip
    part, image = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    factor = 1.0 + tl.load(scale + image * scale_image + column, mask=inside, other=0.0).to(tl.float32)
    sum_shift = tl.zeros((BLOCK,), dtype=tl.float32)
    sum_scale = tl.zeros((BLOCK,), dtype=tl.float32)
    for token in range(part * chunk, tl.minimum((part + 1) * chunk, tokens)):
        row = image * tokens + token
        mean = tl.load(moments + 2 * row)
        rstd = tl.load(moments + 2 * row + 1)
        values = tl.load(x + image * x_image + token * x_token + column, mask=inside, other=0.0).to(tl.float32)
        given = tl.load(grad + image * grad_image + token * grad_token + column, mask=inside, other=0.0)
        given = given.to(tl.float32)
        normed = tl.where(inside, (values - mean) * rstd, 0.0)
        wide = given * factor
        along = tl.sum(wide * normed, axis=0) / width
        result = rstd * (wide - tl.sum(wide, axis=0) / width - normed * along)
        tl.store(grad_x + row * width + column, result.to(grad_x.dtype.element_ty), mask=inside)
        sum_shift += given
        sum_scale += given * normed
    place = parts + (image * tl.num_programs(0) + part) * 2 * width + column
    tl.store(place, sum_shift, mask=inside)
    tl.store(place + width, sum_scale, mask=inside)


@triton.jit
def gated_residual_grad_kernel(
    grad, gate, y, grad_y, parts, tokens, width, chunk,
    grad_image, grad_token, y_image, y_token, gate_image, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part, image = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    factor = tl.load(gate + image * gate_image + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    last = tl.minimum((part + 1) * chunk, tokens)
    for first in range(part * chunk, last, ROWS):
        token = first + tl.arange(0, ROWS)[:, None]
        mask = (token < last) & inside[None, :]
        given = tl.load(grad + image * grad_image + token * grad_token + column[None, :], mask=mask, other=0.0)
        branch = tl.load(y + image * y_image + token * y_token + column[None, :], mask=mask, other=0.0)
        given = given.to(tl.float32)
        result = (given * factor[None, :]).to(grad_y.dtype.element_ty)
        tl.store(grad_y + (image * tokens + token) * width + column[None, :], result, mask=mask)
        total += tl.sum(given * branch.to(tl.float32), axis=0)
    tl.store(parts + (image * tl.num_programs(0) + part) * width + column, total, mask=inside)


@triton.jit
def sum_parts_kernel(parts, total, programs, width, BLOCK: tl.constexpr):
    image = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    result = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in range(programs):
        result += tl.load(parts + (image * programs + part) * width + column, mask=inside, other=0.0)
    tl.store(total + image * width + column, result, mask=inside)


def share_tokens(tokens: int, unit: int = 1) -> tuple[int, int]:
    """Cuts tokens into equal chunks, a function of their number alone.

    Args:
        tokens: N, at least 1.
        unit: what a chunk is a multiple of.

    Returns:
        Number of chunks, at most MAX_PARTS, and tokens in one of them.
    """
    chunk = triton.cdiv(triton.cdiv(tokens, MAX_PARTS), unit) * unit
    return triton.cdiv(tokens, chunk), chunk


def launch_layer_norm_grad(grad: Tensor, x: Tensor, scale: Tensor, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the modulated LayerNorm.

    Args:
        grad: (B, N, D), last axis dense.
        x: (B, N, D), last axis dense.
        scale: (B, 1, D), last axis dense.
        moments: (B, N, 2) from the forward pass.

    Returns:
        Gradients of x (dtype of `x`), shift and scale, both (B, 1, D) float32.
    """
    images, tokens, width = x.shape
    programs, chunk = share_tokens(tokens)
    grad_x = torch.empty((images, tokens, width), dtype=x.dtype, device=x.device)
    parts = torch.empty((images, programs, 2, width), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    layer_norm_grad_kernel[(programs, images)](
        grad, x, scale, moments, grad_x, parts, tokens, width, chunk,
        grad.stride(0), grad.stride(1), x.stride(0), x.stride(1), scale.stride(0),
        BLOCK=block, num_warps=row_warps(block),
    )  # fmt: skip
    grad_shift, grad_scale = sum_parts(parts.flatten(2)).view(images, 2, 1, width).unbind(1)
    return grad_x, grad_shift.clone(), grad_scale.clone()  # an operator may not return two views of one memory


def launch_gated_residual_grad(grad: Tensor, gate: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate, (B, 1, D) float32, and of y, dtype of `y`; arguments as in the forward pass."""
    images, tokens, width = y.shape
    programs, chunk = share_tokens(tokens, GATE_TILE)
    grad_y = torch.empty((images, tokens, width), dtype=y.dtype, device=y.device)
    parts = torch.empty((images, programs, width), dtype=torch.float32, device=y.device)
    block = gate_block(width)
    gated_residual_grad_kernel[(programs, triton.cdiv(width, block), images)](
        grad, gate, y, grad_y, parts, tokens, width, chunk,
        grad.stride(0), grad.stride(1), y.stride(0), y.stride(1), gate.stride(0),
        ROWS=GATE_TILE, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return sum_parts(parts).unsqueeze(1), grad_y


def sum_parts(parts: Tensor) -> Tensor:
    """Adds partial sums (B, P, W) -> (B, W) in the order of P; a library's order could depend on the batch."""
    images, programs, width = parts.shape
    total = torch.empty((images, width), dtype=torch.float32, device=parts.device)
    sum_parts_kernel[(triton.cdiv(width, 128), images)](parts, total, programs, width, BLOCK=128, num_warps=4)
    return total
