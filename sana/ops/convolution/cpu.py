"""Convolutions for inference on a CPU that round alike whatever the size of the image. Autograd does not pass here.

A tile of an image is to get the numbers of the whole image. Two things make a sum depend on the size: PyTorch leaves
inputs of at most 20480 numbers to another kernel, and oneDNN cuts long sums at places that it chooses by the size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sana.ops.packing import packable

CHANNELS_AT_ONCE = 256  # a sum over so many input channels was cut alike for every size (AVX2 and AVX-512 kernels)
SQUARE = 512  # the same, where as many channels come out and the stride is 1


def conv2d_cpu(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, padding: int = 0) -> Tensor:
    """`F.conv2d` without groups; of float32 images always by oneDNN, long sums in parts of `CHANNELS_AT_ONCE`.

    Args:
        x: (B, C, H, W), channels last in memory.
        weight: (C', C, k, k).
        bias: (C',) or None.
        stride, padding: of both axes.

    Returns:
        (B, C', H', W'), channels last in memory.
    """
    if x.dtype != torch.float32:
        return F.conv2d(x, weight, bias, stride, padding)
    channels = weight.shape[1]
    square = channels == len(weight) and stride == 1 and channels <= SQUARE
    if channels <= CHANNELS_AT_ONCE or square:
        return _convolved(x, weight, bias, stride, padding)
    kernels = weight.split(CHANNELS_AT_ONCE, dim=1)
    parts = x.split(CHANNELS_AT_ONCE, dim=1)
    out = _convolved(parts[0].contiguous(memory_format=torch.channels_last), kernels[0], bias, stride, padding)
    for part, kernel in zip(parts[1:], kernels[1:], strict=True):
        out.add_(_convolved(part.contiguous(memory_format=torch.channels_last), kernel, None, stride, padding))
    return out


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    if not packable(x, weight):
        return F.conv2d(x, weight, bias, stride, padding)
    steps = ([padding] * 2, [stride] * 2, [1, 1], 1)
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *steps, "none", [], "")
