"""Root-mean-square normalisation in plain PyTorch with float32 accumulation. The owner of the weight is not here."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {None: lambda x: x, "silu": F.silu, "relu": F.relu}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scales the last axis to unit root mean square, in float32 or wider, then multiplies by `weight` (Zhang 2019).

    Args:
        x: (..., D), any floating dtype.
        weight: (D,).
        eps: added to the mean square.

    Returns:
        (..., D), dtype of `x`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = F.rms_norm(x.to(wide), (x.shape[-1],), weight.to(wide), eps)
    return normed.to(x.dtype)


def rms_norm_2d(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, act: str | None = None) -> Tensor:
    """Scales the channel axis of an image tensor to unit root mean square at every pixel, then applies weight and bias.

    Args:
        x: (B, C, H, W), any floating dtype.
        weight: (C,), or None for no scaling.
        bias: (C,), or None for no shift.
        eps: added to the mean square.
        act: None, "silu" or "relu", last and in the wide dtype too.

    Returns:
        (B, C, H, W), dtype and memory format of `x`.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * weight.to(wide.dtype).view(1, -1, 1, 1)
    if bias is not None:
        normed = normed + bias.to(wide.dtype).view(1, -1, 1, 1)
    return activate(normed, act).to(x.dtype)


def activate(x: Tensor, act: str | None) -> Tensor:
    """Applies the activation that an operator takes by name: None, "silu" or "relu".

    Raises:
        ValueError: for another name.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be None, 'silu' or 'relu', not {act!r}.")
    return ACTIVATIONS[act](x)
