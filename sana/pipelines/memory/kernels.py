"""What kernels hold only while they run, which no operation returns: formulas of shapes, by operation."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten


def cpu_kernels(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Returns the bytes that an operation on a CPU holds besides its arguments and its result.

    oneDNN's convolution makes a copy of the weight in its own layout for the time of the call. Before that PyTorch lays
    the weight out as the image is; or, where that does not have channels last, oneDNN makes a copy of the image too.
    """
    if func is not aten.convolution.default:
        return 0
    x, weight = args[:2]
    if x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        return int(weight.nbytes + x.nbytes)
    return int(weight.nbytes * (1 if weight.is_contiguous(memory_format=torch.channels_last) else 2))


class FusedAttention(TorchFunctionMode):
    """Makes softmax attention the fused operator that a CUDA device has for it, where none can be asked."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    needs_gradient = torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, needs_gradient, dropout_p, is_causal, scale=scale
    )[0]
