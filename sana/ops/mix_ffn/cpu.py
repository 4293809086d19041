"""The Mix-FFN for inference on a CPU: oneDNN products with SiLU inside, channels last, and both halves contiguous."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sana.ops.linear.cpu import linear_cpu
from sana.ops.mix_ffn.reference import WeightBias, depthwise_conv, to_image, to_tokens
from sana.ops.packing import pack, packable

HINT = 32  # height and width for which packed kernels are laid out; any other works


def mix_ffn_cpu(
    x: Tensor, grid: tuple[int, int], inverted: WeightBias, depth: WeightBias, point: WeightBias, *, dilation: int = 1
) -> Tensor:
    """`sana.ops.mix_ffn` with SiLU on the expansion and on the gate; see there for the arguments."""
    value, gate = (_half(x, grid, inverted, depth, dilation, half) for half in (0, 1))
    return linear_cpu(to_tokens(value.mul_(gate)), *point)


def _half(
    x: Tensor, grid: tuple[int, int], inverted: WeightBias, depth: WeightBias, dilation: int, half: int
) -> Tensor:
    """The value (0) or the gate after its SiLU (1), as an image (B, M, H, W)."""
    expanded = to_image(linear_cpu(x, *inverted, "silu", half=half), grid)
    weight, bias = depth[0], None if depth[1] is None else depth[1].chunk(2)[half]
    if not packable(x, weight):
        out = depthwise_conv(expanded, weight.chunk(2)[half], bias, dilation)
        return F.silu(out, inplace=True) if half else out
    pad, channels = weight.shape[-1] // 2 * dilation, len(weight) // 2
    shape = ([pad, pad], [1, 1], [dilation, dilation], channels)

    def make() -> Tensor:
        kernel = weight.chunk(2)[half].detach().contiguous()
        return torch.ops.mkldnn._reorder_convolution_weight(kernel, *shape, [1, channels, HINT, HINT])

    packed = pack(weight, (half, dilation), make)
    if packed is None:
        packed = weight.chunk(2)[half]
    return torch.ops.mkldnn._convolution_pointwise(expanded, packed, bias, *shape, "swish" if half else "none", [], "")
