"""Triton backward kernels of ReLU linear attention and their launcher. The equations of the forward are not here.

With M = sum relu(k)^T v, S = sum relu(k), r = 1 / (relu(q) . S + eps) and g the gradient of the output:

    t = g M^T             a = r (relu(q) . t), which is g . out
    dq = r (t - a S)      where q > 0
    dM = sum (r relu(q))^T g              dS = - sum r a relu(q)
    dk = v dM^T + dS      where k > 0     dv = relu(k) dM

Nothing but qkv, M, S and the row scales is kept from the forward. `query_grad_kernel` reads q and g and writes dq and a
partial (dM, dS) for every chunk; `reduce_kernel` adds these in order; `key_value_grad_kernel` reads k and v and writes
dk and dv. That is 4 reads and 3 writes of h * d elements a token, the least there can be. Norms add one more kernel,
`norm_grad_kernel`, that turns the gradients of the normed rows into those of the rows in place (4 reads, 2 writes) and
adds up the gradients of both weights by blocks of rows. No atomics: two runs give the same bits.

r reaches 1 / eps for a query without a positive entry. In the sums it multiplies relu(q), never g, so that it meets
zeros only; dq is then selected, not multiplied, to be 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana.ops.linear_attention.forward import (
    choose_tiles,
    chunk_rows,
    load_normed,
    load_state,
    locate,
    reduce_chunks,
    relu,
    rows_at_once,
    store_state,
    tile,
)

MAX_NORM_PROGRAMS = 512


@triton.jit
def query_grad_kernel(
    qkv, grad, weight, scale, sums, grad_qkv, parts, tokens, heads, chunk, chunks,
    stride_image, stride_token, grad_stride_image, grad_stride_token, eps,
    D: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of the (normed) queries, and parts[image, chunk, head] = (dM, dS) of one chunk."""
    image, part, head = locate(heads, chunks)
    first = part.to(tl.int64) * chunk
    left = tokens - first
    columns = tl.arange(0, HEAD)
    queries = qkv + image * stride_image + first * stride_token + head * D
    grads = grad + image * grad_stride_image + first * grad_stride_token + head * D
    target = grad_qkv + ((image * tokens + first) * 3 * heads + head) * D
    query_scale = scale + image * tokens + first
    matrix, vector = load_state(sums, image * heads + head, columns, D)
    transposed = tl.trans(matrix)
    grad_matrix = tl.zeros((HEAD, HEAD), tl.float32)
    grad_vector = tl.zeros((HEAD,), tl.float32)
    for start in range(0, tl.minimum(chunk, left).to(tl.int32), ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows[:, None] < left) & (columns[None, :] < D)
        offsets = tile(rows, stride_token, columns)
        query = relu(load_normed(queries, offsets, mask, query_scale, weight + head * D, rows, columns, left, D, NORM))
        g = tl.load(grads + tile(rows, grad_stride_token, columns), mask=mask, other=0.0).to(tl.float32)
        t = tl.dot(g, transposed, input_precision=PRECISION)
        r = 1.0 / (tl.sum(query * vector[None, :], 1) + eps)
        scaled = query * r[:, None]
        a = tl.sum(scaled * t, 1)
        dq = tl.where(query > 0, (t - a[:, None] * vector[None, :]) * r[:, None], 0.0)
        tl.store(target + tile(rows, 3 * heads * D, columns), dq.to(grad_qkv.dtype.element_ty), mask=mask)
        grad_matrix = tl.dot(tl.trans(scaled), g, grad_matrix, input_precision=PRECISION)
        grad_vector -= tl.sum(scaled * a[:, None], 0)
    store_state(parts, (image * chunks + part) * heads + head, grad_matrix, grad_vector, columns, D)


@triton.jit
def key_value_grad_kernel(
    qkv, weight, scale, grad_sums, grad_qkv, images, tokens, heads, stride_image, stride_token,
    D: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of the (normed) keys and of the values."""
    image, block, head = locate(heads, tl.cdiv(tokens, ROWS))
    first = block.to(tl.int64) * ROWS
    left = tokens - first
    columns = tl.arange(0, HEAD)
    rows = tl.arange(0, ROWS)
    mask = (rows[:, None] < left) & (columns[None, :] < D)
    keys = qkv + image * stride_image + first * stride_token + (heads + head) * D
    key_scale = scale + (images + image) * tokens + first
    offsets = tile(rows, stride_token, columns)
    value = tl.load(keys + heads * D + offsets, mask=mask, other=0.0).to(tl.float32)
    key = relu(load_normed(keys, offsets, mask, key_scale, weight + head * D, rows, columns, left, D, NORM))
    grad_matrix, grad_vector = load_state(grad_sums, image * heads + head, columns, D)
    dk = tl.dot(value, tl.trans(grad_matrix), input_precision=PRECISION) + grad_vector[None, :]
    dv = tl.dot(key, grad_matrix, input_precision=PRECISION)
    target = grad_qkv + ((image * tokens + first) * 3 * heads + heads + head) * D + tile(rows, 3 * heads * D, columns)
    tl.store(target, tl.where(key > 0, dk, 0.0).to(grad_qkv.dtype.element_ty), mask=mask)
    tl.store(target + heads * D, dv.to(grad_qkv.dtype.element_ty), mask=mask)


@triton.jit
def norm_grad_kernel(
    qkv, q_weight, k_weight, scale, grad_qkv, parts, total, tokens, width, chunk, stride_image, stride_token,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turns gradients of normed queries (second program axis 0) or keys (1) into those of the rows, in place.

    The rows of all images count through. parts[which, program] is the sum of this program's gradients of the weight.
    """
    which = tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight = k_weight if which == 1 else q_weight
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    grad_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, chunk, ROWS):
        rows = tl.program_id(0).to(tl.int64) * chunk + start + tl.arange(0, ROWS)
        mask = (rows[:, None] < total) & inside[None, :]
        offsets = rows // tokens * stride_image + rows % tokens * stride_token + which * width
        target = grad_qkv + tile(rows * 3 + which, width, columns)
        x = tl.load(qkv + tile(offsets, 1, columns), mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(target, mask=mask, other=0.0).to(tl.float32)
        row_scale = tl.load(scale + which.to(tl.int64) * total + rows, mask=rows < total, other=0.0)[:, None]
        normed = x * row_scale
        grad_weight += grad * normed
        grad *= w
        along = tl.sum(grad * normed, 1) / width
        grad = (grad - normed * along[:, None]) * row_scale
        tl.store(target, grad.to(grad_qkv.dtype.element_ty), mask=mask)
    part = which * tl.num_programs(0) + tl.program_id(0)
    tl.store(parts + part * width + columns, tl.sum(grad_weight, 0), mask=inside)


def norm_gradients(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, scale: Tensor, grad_qkv: Tensor) -> Tensor:
    """Applies the norms' backward to `grad_qkv` in place and returns the gradients of both weights, (2, h * d)."""
    images, tokens, packed = qkv.shape
    width, total = packed // 3, images * tokens
    block = triton.next_power_of_2(width)
    rows = rows_at_once(block, 8192)
    chunk = triton.cdiv(triton.cdiv(total, MAX_NORM_PROGRAMS), rows) * rows
    programs = triton.cdiv(total, chunk)
    parts = scale.new_empty((2, programs, width))
    norm_grad_kernel[(programs, 2)](
        qkv, q_weight, k_weight, scale, grad_qkv, parts, total, tokens, width, chunk, qkv.stride(0), qkv.stride(1),
        ROWS=rows, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return parts.sum(dim=1)


def launch_backward(
    grad: Tensor,
    qkv: Tensor,
    sums: Tensor,
    scale: Tensor,
    num_heads: int,
    eps: float,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Runs the backward passes on what `launch_forward` got and returned.

    Returns:
        The gradient of qkv, contiguous, and of both weights (2, h * d) float32, empty without norms.
    """
    images, tokens, packed = qkv.shape
    head_dim = packed // (3 * num_heads)
    tiles = choose_tiles(head_dim, qkv.dtype)
    normed = q_weight is not None
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    chunk = chunk_rows(tokens)
    chunks = triton.cdiv(tokens, chunk)
    parts = sums.new_empty((images, chunks, num_heads, head_dim + 1, head_dim))
    shape = {"D": head_dim, "HEAD": tiles.head, "ROWS": tiles.rows, "NORM": normed, "PRECISION": tiles.precision}
    strides = qkv.stride(0), qkv.stride(1)
    query_grad_kernel[(images * chunks * num_heads,)](
        qkv, grad, q_weight if normed else qkv, scale, sums, grad_qkv, parts, tokens, num_heads, chunk, chunks,
        *strides, grad.stride(0), grad.stride(1), eps, **shape | {"ROWS": tiles.grad_rows}, num_warps=tiles.num_warps,
    )  # fmt: skip
    key_value_grad_kernel[(images * triton.cdiv(tokens, tiles.rows) * num_heads,)](
        qkv, k_weight if normed else qkv, scale, reduce_chunks(parts), grad_qkv, images, tokens, num_heads, *strides,
        **shape, num_warps=tiles.num_warps,
    )  # fmt: skip
    if q_weight is None or k_weight is None:
        return grad_qkv, sums.new_empty((2, 0))
    return grad_qkv, norm_gradients(qkv, q_weight, k_weight, scale, grad_qkv)
