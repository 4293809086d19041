"""The Mix-FFN for inference on a CPU: oneDNN products with SiLU inside, channels last, both halves contiguous."""

import torch.nn.functional as F
from torch import Tensor

from sana.ops.linear.cpu import linear_cpu
from sana.ops.mix_ffn.reference import WeightBias, depthwise_conv, to_image, to_tokens


def mix_ffn_cpu(
    x: Tensor, grid: tuple[int, int], inverted: WeightBias, depth: WeightBias, point: WeightBias, *, dilation: int = 1
) -> Tensor:
    """`sana.ops.mix_ffn` with SiLU on the expansion and on the gate; see there for the arguments."""
    halves = []
    for half in (0, 1):
        expanded = to_image(linear_cpu(x, *inverted, "silu", half=half), grid)
        weight, bias = (None if tensor is None else tensor.chunk(2)[half] for tensor in depth)
        assert weight is not None
        halves.append(depthwise_conv(expanded, weight, bias, dilation))
    value, gate = halves
    return linear_cpu(to_tokens(value.mul_(F.silu(gate, inplace=True))), *point)
