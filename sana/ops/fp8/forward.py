"""Triton kernel that rounds the rows of a matrix to e4m3: one read, one write. The product is PyTorch's own."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana.ops.fp8.reference import FP8, Fp8Rows

MAX_WIDTH = 16384  # a row lives in the registers of one program


@triton.jit
def quantize_rows_kernel(x_ptr, values_ptr, scale_ptr, width, row_stride, smallest, BLOCK: tl.constexpr):
    """One program a row: greatest magnitude, scale, e4m3 numbers; see `reference.quantize_rows`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + row * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
    greatest = tl.max(tl.abs(x), axis=0)
    scale = tl.maximum(tl.div_rn(greatest, 448.0), smallest)
    broken = tl.max((x != x).to(tl.int32), axis=0)  # tl.max passes over NaN
    scale = tl.where(broken > 0, float("nan"), scale)
    values = tl.div_rn(x, scale).to(tl.float8e4nv)
    tl.store(values_ptr + row * width + columns, values, mask=inside)
    tl.store(scale_ptr + row, scale)


def quantize_rows_triton(x: Tensor) -> Fp8Rows:
    """`reference.quantize_rows` bit for bit, on a CUDA GPU of compute capability 8.9 or later.

    Args:
        x: (M, K) float32, float16 or bfloat16; K is contiguous.

    Raises:
        ValueError: K is not contiguous or exceeds 16384.
    """
    count, width = x.shape
    if x.stride(1) != 1 or width > MAX_WIDTH:
        raise ValueError(f"x must have contiguous rows of at most {MAX_WIDTH} numbers, not {width} with {x.stride()}.")
    values = torch.empty((count, width), dtype=FP8, device=x.device)
    scale = torch.empty((count, 1), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    smallest = torch.finfo(torch.float32).tiny
    quantize_rows_kernel[(count,)](
        x, values, scale, width, x.stride(0), smallest, BLOCK=block, num_warps=max(1, min(16, block // 512))
    )
    return Fp8Rows(values, scale)
