"""The Mix-FFN for inference on a CPU: oneDNN products with SiLU inside, channels last. Gradients are not here.

What is 2 M wide is the largest activation of a block. A large image is therefore computed in chunks of grid rows, and
the rows that two chunks share are carried over: nothing is computed twice, in a bounded amount of memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sana.ops.chunks import every
from sana.ops.linear.cpu import linear_cpu
from sana.ops.mix_ffn.reference import WeightBias, to_image, to_tokens
from sana.ops.packing import pack, packable

CACHE_BYTES = 2**24  # an expansion beyond this is made in two halves, which leaves more of it in the cache
CHUNK_BYTES = 2**25  # half of the expansion of one image beyond this is made in chunks, none of them larger
HINT = 32  # height and width for which packed kernels are laid out; any other works


def mix_ffn_cpu(
    x: Tensor, grid: tuple[int, int], inverted: WeightBias, depth: WeightBias, point: WeightBias, *, dilation: int = 1
) -> Tensor:
    """`sana.ops.mix_ffn` with SiLU on the expansion and on the gate; see there for the arguments.

    How an image is cut depends on its own size alone, never on the batch.
    """
    wide, reach = len(depth[0]), depth[0].shape[-1] // 2 * dilation
    rows = chunk_rows(grid, wide // 2 * x.element_size(), reach)
    if rows < grid[0]:
        out = x.new_empty(*x.shape[:2], len(point[0]))
        for image, result in zip(x.split(1), out.split(1), strict=True):
            _by_chunks(image, result, grid[1], rows, (inverted, depth, point), dilation)
        return out
    if x.shape[0] * x.shape[1] * wide * x.element_size() <= CACHE_BYTES:
        expanded = linear_cpu(x, *inverted, "silu")
        value, gate = _convolved(expanded, grid[1], depth, (reach, reach), dilation).chunk(2, dim=-1)
    else:
        value, gate = (
            _convolved(linear_cpu(x, *inverted, "silu", half=half), grid[1], depth, (reach, reach), dilation, half)
            for half in (0, 1)
        )
    return _projected(value, gate, point)


def chunk_rows(grid: tuple[int, int], token_bytes: int, reach: int) -> int:
    """Returns how many rows of a grid are computed at once: all of them, or those of one of about equal chunks.

    Args:
        grid: (H, W) in tokens.
        token_bytes: of half the expansion of one token.
        reach: of the convolution to either side, in tokens; a chunk has twice as many rows at least.
    """
    height, width = grid
    most = max(CHUNK_BYTES // (width * token_bytes), 2 * reach, 1)
    chunks = -(-height // most)
    return -(-height // chunks)


def _by_chunks(
    x: Tensor, out: Tensor, width: int, rows: int, layers: tuple[WeightBias, WeightBias, WeightBias], dilation: int
) -> None:
    """Computes one image (1, N, D), `rows` rows of `width` tokens at a time, and writes it to `out` (1, N, D').

    The convolution of a row reads `reach` rows above and below it, zeros outside of the image. So a chunk gives the
    rows whose surroundings are known, and hands its last 2 * reach expanded rows on to the next one.
    """
    inverted, depth, point = layers
    reach = depth[0].shape[-1] // 2 * dilation
    chunks = every(x.split(rows * width, dim=1))
    outside = x.new_zeros(1, reach * width, len(depth[0]) // 2)
    carried, done = [outside, outside], 0
    for number, tokens in enumerate(chunks, start=1):
        halves = []
        for half in (0, 1):
            parts = [carried[half], linear_cpu(tokens, *inverted, "silu", half=half)]
            expanded = torch.cat([*parts, outside] if number == len(chunks) else parts, dim=1)
            del parts  # two copies of one chunk at a time are enough
            carried[half] = expanded[:, expanded.shape[1] - 2 * reach * width :].clone()
            halves.append(_convolved(expanded, width, depth, (0, reach), dilation, half))
            del expanded
        known = halves[0].shape[1]
        out[:, done : done + known] = _projected(*halves, point)
        done += known


def _convolved(
    x: Tensor, width: int, depth: WeightBias, padding: tuple[int, int], dilation: int, half: int | None = None
) -> Tensor:
    """Expanded tokens (B, N, C) after the depthwise convolution, of the value (0) or the gate (1) only if so told.

    Without padding of the height, so many rows less come out at either end.
    """
    image, channels = to_image(x, (x.shape[1] // width, width)), x.shape[-1]
    bias = None if depth[1] is None else _half(depth[1], half)
    if not packable(x, depth[0]):
        kernel = _half(depth[0], half)
        return to_tokens(F.conv2d(image, kernel, bias, padding=padding, dilation=dilation, groups=channels))
    steps = ([1, 1], [dilation, dilation], channels)

    def make() -> Tensor:
        kernel = _half(depth[0], half).detach().contiguous()
        square = [padding[1], padding[1]]
        return torch.ops.mkldnn._reorder_convolution_weight(kernel, square, *steps, [1, channels, HINT, HINT])

    packed = pack(depth[0], (half, dilation), make)
    kernel = _half(depth[0], half) if packed is None else packed
    return to_tokens(
        torch.ops.mkldnn._convolution_pointwise(image, kernel, bias, list(padding), *steps, "none", [], "")
    )


def _projected(value: Tensor, gate: Tensor, point: WeightBias) -> Tensor:
    """Gated tokens (B, N, M) -> (B, N, D')."""
    # SiLU writes a contiguous gate: working in place on half of a wide tensor costs several times as much
    return linear_cpu(F.silu(gate).mul_(value), *point)


def _half(tensor: Tensor, half: int | None) -> Tensor:
    return tensor if half is None else tensor.chunk(2)[half]
