"""Linear layers for inference on a CPU through oneDNN, with weights packed once. Autograd does not pass through here.

PyTorch's `F.linear` gives float32 products to MKL, which on AMD processors reaches a third of what oneDNN does. The
operators are those that torch.compile emits for frozen weights; where this PyTorch lacks them, `F.linear` stands in.
"""

import os

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

ACTIVATIONS = {None: "none", "silu": "swish", "relu": "relu"}
GIB = 2**30

# weight -> {part: (what the weight was when it was packed, the packed copy)}; an entry goes with its weight.
_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def linear_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, act: str | None = None, *, half: int | None = None
) -> Tensor:
    """act(x @ weight^T + bias).

    A weight that does not require gradients is packed at its first use and the copy kept, up to `pack_budget()` bytes
    in all. A copy is made anew after the weight was changed by any in-place operation, moved or cast; changes through
    `.data` are not seen.

    Args:
        x: (..., K) float32 or bfloat16; other dtypes go through `F.linear`.
        weight: (N, K), or (N, K, 1, 1) of a 1x1 convolution.
        bias: (N,) or None.
        act: None, "silu" or "relu", fused into the product.
        half: 0 or 1 to compute only the first or the second half of the outputs; None: all.

    Returns:
        (..., N), or (..., N / 2).
    """
    matrix = weight.flatten(1) if weight.dim() > 2 else weight
    if half is not None:
        matrix, bias = matrix.chunk(2)[half], None if bias is None else bias.chunk(2)[half]
    if x.dtype != weight.dtype or x.dtype not in (torch.float32, torch.bfloat16) or not available():
        return _plain(x, matrix, bias, act)
    if type(weight) not in (Tensor, torch.nn.Parameter):  # a quantised weight multiplies in its own way
        return _plain(x, matrix, bias, act)
    packed = _pack(weight, matrix, half)
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, ACTIVATIONS[act], [], "")


def available() -> bool:
    """Whether this PyTorch has oneDNN's linear layer."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def pack_budget() -> int:
    """Bytes that packed copies may take in all: a quarter of the memory, at most 4 GiB."""
    return min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4, 4 * GIB)


def _pack(weight: Tensor, matrix: Tensor, part: int | None) -> Tensor:
    """Returns the packed copy of a matrix, which is a weight or a part of it; the matrix itself where the weight may
    change unseen, or the budget is spent."""
    if weight.requires_grad or weight.is_inference():
        return matrix
    state = (weight.data_ptr(), weight._version, weight.dtype, weight.shape)
    copies = _packed.setdefault(weight, {})
    if part in copies and copies[part][0] == state:
        return copies[part][1]
    copies.pop(part, None)
    used = sum(packed.nbytes for parts in _packed.values() for _, packed in parts.values())
    if used + matrix.nbytes > pack_budget():
        return matrix
    packed = torch.ops.mkldnn._reorder_linear_weight(matrix.detach().contiguous(), None)
    copies[part] = (state, packed)
    return packed


def _plain(x: Tensor, matrix: Tensor, bias: Tensor | None, act: str | None) -> Tensor:
    out = F.linear(x, matrix, bias)
    if act == "silu":
        return F.silu(out, inplace=True)
    return out.relu_() if act == "relu" else out
