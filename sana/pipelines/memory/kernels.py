"""What kernels hold only while they run, which no operation returns: formulas of shapes, by operation."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default)


class CpuKernels:
    """The copies of weights that oneDNN makes for the time of one call, where none is kept.

    Args:
        unpacked: weights of our own products of which no packed copy is kept.
    """

    def __init__(self, unpacked: Iterable[Tensor] = ()) -> None:
        self._unpacked = {weight.untyped_storage()._cdata for weight in unpacked}

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
        """Returns the bytes that an operation holds besides its arguments and its result."""
        if func is aten.convolution.default:
            return self._convolution(*args[:2])
        if func in PRODUCTS:
            return sum(one.nbytes for one in args if isinstance(one, Tensor) and self._is_unpacked(one))
        return 0

    def _is_unpacked(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._unpacked

    @staticmethod
    def _convolution(x: Tensor, weight: Tensor) -> int:
        """A weight in the layout of the image, and one in oneDNN's own."""
        last = torch.channels_last if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) else None
        same = weight.is_contiguous() if last is None else weight.is_contiguous(memory_format=last)
        return weight.nbytes * (1 if same else 2)


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
