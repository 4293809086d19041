"""Triton forward kernels of ReLU linear attention and their launcher. Checks, autograd and gradients are not here.

1. `sums_kernel`: every chunk of tokens of every head adds up relu(k)^T v and relu(k) in float32;
2. `reduce_kernel`: adds the chunks, always in the same order (left out where there is one chunk);
3. `output_kernel`: relu(q) (sum relu(k)^T v) / (relu(q) . sum relu(k) + eps).

With an RMSNorm of queries and keys over all heads, `rms_kernel` comes first: 1 / RMS of every row of q and k.

Bytes that must move, per token, with D = h * d and s bytes an element (bounds, not measurements):

| pass | reads | writes |
|---|---|---|
| sums | 2 s D (k, v) | 4 (d + 1) D chunks / N, later read again: 13 % of 2 s D for d = 32 in 16 bits, if N >= 256 |
| output | s D (q) | s D |
| rms, if asked for | 2 s D (q, k) | 8 |
| backward, see `backward.py` | 4 s D | 3 s D |

So the forward moves 4 s D a token, 9.2 kB at D = 1152 in bfloat16, and the backward 7 s D. The forward needs 4 d FLOPs
an element of q, which is 16 FLOPs a byte at d = 32 in 16 bits: bandwidth is the limit.

How tokens are cut into chunks depends on N alone, so an image's result does not depend on the batch it is in.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_CHUNKS = 32
MIN_CHUNK = 256


@dataclass(frozen=True)
class Tiles:
    """Block sizes of one launch: a plain function of head dim and dtype, so that every run adds in the same order.

    Args:
        head: head dim rounded up to a power of two.
        rows: tokens in one block; divides MIN_CHUNK.
        grad_rows: the same in `query_grad_kernel`, which holds more in registers.
        precision: of products with float32 operands, "tf32" or "ieee".
        num_warps: as launched.
    """

    head: int
    rows: int
    grad_rows: int
    precision: str
    num_warps: int


def choose_tiles(head_dim: int, dtype: torch.dtype) -> Tiles:
    """Returns the block sizes for a head dim (at most 128) and a dtype.

    Products of two 16-bit tensors keep their dtype. Those with a float32 sum use tf32, which has float16's precision
    and float32's range; for float32 tensors they are exact.
    """
    head = max(16, triton.next_power_of_2(head_dim))
    rows = {128: 32, 64: 64}.get(head, 128)
    num_warps = 8 if head == 128 else 4
    if dtype == torch.float32:
        return Tiles(head, max(32, rows // 2), max(16, rows // 4), "ieee", num_warps)
    return Tiles(head, rows, min(64, rows), "tf32", num_warps)


def chunk_rows(tokens: int) -> int:
    """Returns how many tokens one program adds up: a multiple of MIN_CHUNK that leaves at most MAX_CHUNKS chunks."""
    return triton.cdiv(triton.cdiv(tokens, MAX_CHUNKS), MIN_CHUNK) * MIN_CHUNK


@triton.jit
def locate(heads, chunks):
    """Returns (image, chunk, head) of this program; heads run fastest, since neighbours share cache lines."""
    program = tl.program_id(0)
    return (program // (heads * chunks)).to(tl.int64), program // heads % chunks, program % heads


@triton.jit
def relu(x):
    """max(x, 0), where NaN stays NaN."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def tile(rows, row_stride, columns):
    """Offsets of a block of memory."""
    return rows[:, None] * row_stride + columns[None, :]


@triton.jit
def load_state(sums, image_head, columns, D: tl.constexpr):
    """Returns (sum relu(k)^T v, sum relu(k)) of one head of one image, zero beyond the head dim."""
    base = sums + image_head * ((D + 1) * D)
    inside = columns < D
    matrix = tl.load(base + tile(columns, D, columns), mask=inside[:, None] & inside[None, :], other=0.0)
    return matrix, tl.load(base + D * D + columns, mask=inside, other=0.0)


@triton.jit
def store_state(sums, index, matrix, vector, columns, D: tl.constexpr):
    """Writes one head's (d, d) matrix and the vector behind it."""
    base = sums + index * ((D + 1) * D)
    inside = columns < D
    tl.store(base + tile(columns, D, columns), matrix, mask=inside[:, None] & inside[None, :])
    tl.store(base + D * D + columns, vector, mask=inside)


@triton.jit
def load_normed(base, offsets, mask, scale, weight, rows, columns, tokens, D: tl.constexpr, NORM: tl.constexpr):
    """Returns a block of queries or keys in float32, before the ReLU.

    `base`, `scale` and `weight` stand at the block's first token and head.
    """
    x = tl.load(base + offsets, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        row_scale = tl.load(scale + rows, mask=rows < tokens, other=0.0)
        x = x * row_scale[:, None] * tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def rms_kernel(
    qkv, scale, images, tokens, width, stride_image, stride_token, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """1 / sqrt(mean of squares + eps) of the rows of q (second program axis 0) and k (1) over all heads."""
    blocks = tl.cdiv(tokens, ROWS)
    which = tl.program_id(1)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    base = qkv + image * stride_image + first * stride_token + which * width
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = (rows[:, None] < tokens - first) & (columns[None, :] < width)
        x = tl.load(base + tile(rows, stride_token, columns), mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(x * x, 1)
    tl.store(
        scale + (which * images + image) * tokens + first + rows, tl.rsqrt(total / width + eps), rows < tokens - first
    )


@triton.jit
def sums_kernel(
    qkv, weight, scale, sums, images, tokens, heads, chunk, chunks, stride_image, stride_token,
    D: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums[image, chunk, head] = (sum relu(k)^T v, sum relu(k)) over the tokens of one chunk."""
    image, part, head = locate(heads, chunks)
    first = part.to(tl.int64) * chunk
    left = tokens - first
    columns = tl.arange(0, HEAD)
    keys = qkv + image * stride_image + first * stride_token + (heads + head) * D
    values = keys + heads * D
    key_scale = scale + (images + image) * tokens + first
    matrix = tl.zeros((HEAD, HEAD), tl.float32)
    vector = tl.zeros((HEAD,), tl.float32)
    for start in range(0, tl.minimum(chunk, left).to(tl.int32), ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows[:, None] < left) & (columns[None, :] < D)
        offsets = tile(rows, stride_token, columns)
        value = tl.load(values + offsets, mask=mask, other=0.0)
        key = relu(load_normed(keys, offsets, mask, key_scale, weight + head * D, rows, columns, left, D, NORM))
        key = key.to(value.dtype)
        matrix = tl.dot(tl.trans(key), value, matrix, input_precision=PRECISION)
        vector += tl.sum(key.to(tl.float32), 0)
    store_state(sums, (image * chunks + part) * heads + head, matrix, vector, columns, D)


@triton.jit
def reduce_kernel(parts, sums, size, chunks, BLOCK: tl.constexpr):
    """sums[image] = parts[image, 0] + parts[image, 1] + ..., `size` numbers each, in this order."""
    blocks = tl.cdiv(size, BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    base = parts + image * chunks * size + columns
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(chunks):
        total += tl.load(base, mask=columns < size, other=0.0)
        base += size
    tl.store(sums + image * size + columns, total, mask=columns < size)


@triton.jit
def output_kernel(
    qkv, weight, scale, sums, out, tokens, heads, stride_image, stride_token, eps,
    D: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[image, token, head] = relu(q) matrix / (relu(q) . vector + eps)."""
    image, block, head = locate(heads, tl.cdiv(tokens, ROWS))
    first = block.to(tl.int64) * ROWS
    left = tokens - first
    columns = tl.arange(0, HEAD)
    rows = tl.arange(0, ROWS)
    mask = (rows[:, None] < left) & (columns[None, :] < D)
    queries = qkv + image * stride_image + first * stride_token + head * D
    query_scale = scale + image * tokens + first
    offsets = tile(rows, stride_token, columns)
    query = relu(load_normed(queries, offsets, mask, query_scale, weight + head * D, rows, columns, left, D, NORM))
    matrix, vector = load_state(sums, image * heads + head, columns, D)
    numerator = tl.dot(query, matrix, input_precision=PRECISION)
    denominator = tl.sum(query * vector[None, :], 1) + eps
    target = out + ((image * tokens + first) * heads + head) * D + tile(rows, heads * D, columns)
    tl.store(target, (numerator / denominator[:, None]).to(out.dtype.element_ty), mask=mask)


def rows_at_once(block: int, elements: int) -> int:
    """Returns how many rows of `block` elements one program holds so that it holds at most `elements`, 1 to 32."""
    return max(1, min(32, elements // block))


def row_scales(qkv: Tensor, eps: float) -> Tensor:
    """Returns 1 / RMS of every row of q and of k over all heads, (2, B, N) float32."""
    images, tokens, packed = qkv.shape
    scale = qkv.new_empty((2, images, tokens), dtype=torch.float32)
    block = min(1024, triton.next_power_of_2(packed // 3))
    rows = rows_at_once(block, 4096)
    rms_kernel[(images * triton.cdiv(tokens, rows), 2)](
        qkv, scale, images, tokens, packed // 3, qkv.stride(0), qkv.stride(1), eps, ROWS=rows, BLOCK=block
    )
    return scale


def reduce_chunks(parts: Tensor) -> Tensor:
    """Adds the chunks of (B, chunks, h, d + 1, d) in order -> (B, h, d + 1, d)."""
    images, chunks, *state = parts.shape
    if chunks == 1:
        return parts[:, 0]
    sums = parts.new_empty((images, *state))
    size = sums[0].numel()
    block = 1024
    reduce_kernel[(images * triton.cdiv(size, block),)](parts, sums, size, chunks, BLOCK=block)
    return sums


def launch_forward(
    qkv: Tensor, num_heads: int, eps: float, q_weight: Tensor | None, k_weight: Tensor | None, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the forward passes on checked inputs.

    Returns:
        The output (B, N, h * d); the sums (B, h, d + 1, d) float32, relu(k)^T v above relu(k); 1 / RMS of the rows of q
        and k (2, B, N) float32, empty without norms.
    """
    images, tokens, packed = qkv.shape
    width = packed // 3
    head_dim = width // num_heads
    tiles = choose_tiles(head_dim, qkv.dtype)
    normed = q_weight is not None
    scale = row_scales(qkv, norm_eps) if normed else qkv.new_empty(0, dtype=torch.float32)
    chunk = chunk_rows(tokens)
    chunks = triton.cdiv(tokens, chunk)
    parts = qkv.new_empty((images, chunks, num_heads, head_dim + 1, head_dim), dtype=torch.float32)
    shape = {"D": head_dim, "HEAD": tiles.head, "ROWS": tiles.rows, "NORM": normed, "PRECISION": tiles.precision}
    strides = qkv.stride(0), qkv.stride(1)
    sums_kernel[(images * chunks * num_heads,)](
        qkv, k_weight if normed else qkv, scale, parts, images, tokens, num_heads, chunk, chunks, *strides,
        **shape, num_warps=tiles.num_warps,
    )  # fmt: skip
    sums = reduce_chunks(parts)
    out = qkv.new_empty((images, tokens, width))
    output_kernel[(images * triton.cdiv(tokens, tiles.rows) * num_heads,)](
        qkv, q_weight if normed else qkv, scale, sums, out, tokens, num_heads, *strides, eps,
        **shape, num_warps=tiles.num_warps,
    )  # fmt: skip
    return out, sums, scale
