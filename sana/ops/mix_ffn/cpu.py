"""The Mix-FFN for inference on a CPU: oneDNN products with SiLU inside, channels last. Gradients are not here."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sana.ops.linear.cpu import linear_cpu
from sana.ops.mix_ffn.reference import WeightBias, depthwise_conv, to_image, to_tokens
from sana.ops.packing import pack, packable

CACHE_BYTES = 2**24  # an expansion beyond this is made in two halves, which leaves more of it in the cache
HINT = 32  # height and width for which packed kernels are laid out; any other works


def mix_ffn_cpu(
    x: Tensor, grid: tuple[int, int], inverted: WeightBias, depth: WeightBias, point: WeightBias, *, dilation: int = 1
) -> Tensor:
    """`sana.ops.mix_ffn` with SiLU on the expansion and on the gate; see there for the arguments."""
    expanded_bytes = x.shape[0] * x.shape[1] * len(depth[0]) * x.element_size()
    if expanded_bytes <= CACHE_BYTES:
        value, gate = _convolved(x, grid, inverted, depth, dilation, None).chunk(2, dim=-1)
    else:
        value, gate = (_convolved(x, grid, inverted, depth, dilation, half) for half in (0, 1))
    # SiLU writes a contiguous gate: working in place on half of a wide tensor costs several times as much
    return linear_cpu(F.silu(gate).mul_(value), *point)


def _convolved(
    x: Tensor, grid: tuple[int, int], inverted: WeightBias, depth: WeightBias, dilation: int, half: int | None
) -> Tensor:
    """Tokens (B, N, 2M) after expansion and depthwise convolution, or of the value (0) or the gate (1) only."""
    image = to_image(linear_cpu(x, *inverted, "silu", half=half), grid)
    bias = None if depth[1] is None else _half(depth[1], half)
    if not packable(x, depth[0]):
        return to_tokens(depthwise_conv(image, _half(depth[0], half), bias, dilation))
    channels, pad = image.shape[1], depth[0].shape[-1] // 2 * dilation
    shape = ([pad, pad], [1, 1], [dilation, dilation], channels)

    def make() -> Tensor:
        kernel = _half(depth[0], half).detach().contiguous()
        return torch.ops.mkldnn._reorder_convolution_weight(kernel, *shape, [1, channels, HINT, HINT])

    packed = pack(depth[0], (half, dilation), make)
    kernel = _half(depth[0], half) if packed is None else packed
    return to_tokens(torch.ops.mkldnn._convolution_pointwise(image, kernel, bias, *shape, "none", [], ""))


def _half(tensor: Tensor, half: int | None) -> Tensor:
    return tensor if half is None else tensor.chunk(2)[half]
