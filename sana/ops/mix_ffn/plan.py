"""Block shapes of the Mix-FFN's kernels as plain functions of shape and device. Kernels and launchers are not here.

Nothing here has been measured on a GPU yet: block shapes follow the sizes of registers and shared memory, and the
choice between the two ways to the expansion follows the roofline with an assumed efficiency. No choice depends on the
batch, so the result of one image does not depend on its neighbours.
"""

from typing import NamedTuple

import torch

Capability = tuple[int, int]


class Gemm(NamedTuple):
    """Block shape of the expansion: a program computes block_m tokens by block_n channels (of two halves if gated)."""

    block_m: int
    block_n: int
    block_k: int
    group: int  # row blocks that share columns of the weight before the next columns: reuse in the second-level cache
    warps: int
    stages: int


class Tile(NamedTuple):
    """Block of a depthwise kernel: a program slides down `rows` rows of a strip of columns by channels."""

    rows: int
    columns: int
    channels: int
    warps: int


class Machine(NamedTuple):
    """What decides whether an epilogue pays: data-sheet figures, and an assumed share of the library's speed."""

    flops: float  # 16-bit, dense, per second
    bandwidth: float  # bytes per second
    share: float  # speed of the Triton GEMM over the library's: assumed


MACHINES = {
    8: Machine(312e12, 2.0e12, 0.9),
    9: Machine(989e12, 4.8e12, 0.8),
    10: Machine(2250e12, 8.0e12, 0.6),
}
INTERPRETED = Gemm(16, 16, 16, 2, 1, 1)


def expansion_plan(
    tokens: int, columns: int, inner: int, dtype: torch.dtype, capability: Capability | None
) -> Gemm | None:
    """Chooses how the expansion is computed: one GEMM with an epilogue, or the library's GEMM and a pointwise kernel.

    The epilogue saves one write and one read of the expanded tensor, 2 * columns * itemsize bytes a token; the library
    is faster at the 2 * columns * inner FLOPs a token. So the epilogue pays up to a certain `inner`. Not measured yet.

    Args:
        tokens: of ONE image, so that the choice does not depend on the batch.
        columns: width of the expansion (2M).
        inner: width of the tokens (D).
        dtype: of tokens and weights.
        capability: of the CUDA device; None in Triton's interpreter.

    Returns:
        The block shape of the Triton kernel, or None for the library.
    """
    if capability is None:
        return None if dtype == torch.bfloat16 else INTERPRETED  # the interpreter multiplies bfloat16 blocks wrongly
    if dtype == torch.float32 or inner % 8 or columns % 8:
        return None  # exact float32 runs outside tensor cores; odd widths defeat wide loads
    machine = MACHINES.get(capability[0])
    if machine is None:
        return Gemm(128, 128, 32, 8, 8, 2)
    saved = 2 * columns * dtype.itemsize / machine.bandwidth
    lost = 2 * columns * inner / machine.flops * (1 / machine.share - 1)
    if lost > saved:
        return None
    if capability[0] == 8:
        return Gemm(128, 128, 32, 8, 8, 3)
    return Gemm(128, 256, 64, 8, 8, 3) if tokens >= 1024 else Gemm(128, 128, 64, 8, 8, 4)


def forward_tile(height: int, capability: Capability | None) -> Tile:
    """Returns the block of the depthwise forward: 2 channels a thread, whose 18 weights each stay in registers."""
    return Tile(2, 4, 16, 1) if capability is None else Tile(min(height, 8), 8, 64, 8)


def weight_gradient_tile(height: int, capability: Capability | None) -> Tile:
    """Returns the block of the gate's backward: long strips, since each leaves 10 partial sums a channel."""
    return Tile(3, 4, 16, 1) if capability is None else Tile(min(height, 64), 8, 64, 8)


def input_gradient_tile(height: int, capability: Capability | None) -> Tile:
    """Returns the block of the transposed convolution; a strip leaves one partial sum a channel."""
    return Tile(2, 4, 16, 1) if capability is None else Tile(min(height, 32), 8, 64, 4)
