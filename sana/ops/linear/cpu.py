"""Linear layers for inference on a CPU through oneDNN, with weights packed once. Autograd does not pass through here.

PyTorch's `F.linear` gives float32 products to MKL, which on AMD processors reaches a third of what oneDNN does. Where
this PyTorch lacks the operator, `F.linear` stands in.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sana.ops.packing import pack, packable

ACTIVATIONS = {None: "none", "silu": "swish", "relu": "relu"}


def linear_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, act: str | None = None, *, half: int | None = None
) -> Tensor:
    """act(x @ weight^T + bias). For when copies of weights are made anew, see `sana.ops.packing.pack`.

    Args:
        x: (..., K) float32 or bfloat16; other dtypes go through `F.linear`.
        weight: (N, K), or (N, K, 1, 1) of a 1x1 convolution.
        bias: (N,) or None.
        act: None, "silu" or "relu", fused into the product.
        half: 0 or 1 to compute only the first or the second half of the outputs; None: all.

    Returns:
        (..., N), or (..., N / 2).
    """
    if half is not None and bias is not None:
        bias = bias.chunk(2)[half]
    if not packable(x, weight):
        return _plain(x, _matrix(weight, half), bias, act)
    packed = pack(weight, half, lambda: _reordered(_matrix(weight, half)))
    if packed is None:
        packed = _matrix(weight, half)
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, ACTIVATIONS[act], [], "")


def _matrix(weight: Tensor, half: int | None) -> Tensor:
    matrix = weight.flatten(1) if weight.dim() > 2 else weight
    return matrix if half is None else matrix.chunk(2)[half]


def _reordered(matrix: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(matrix.detach().contiguous(), None)


def _plain(x: Tensor, matrix: Tensor, bias: Tensor | None, act: str | None) -> Tensor:
    out = F.linear(x, matrix, bias)
    if act == "silu":
        return F.silu(out, inplace=True)
    return out.relu_() if act == "relu" else out
