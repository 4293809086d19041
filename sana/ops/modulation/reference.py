"""adaLN in plain PyTorch with float32 accumulation: the judge of every faster version. Tables of time are not here."""

import torch
import torch.nn.functional as F
from torch import Tensor


def modulated_layer_norm_reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, without weight and bias of the norm (DiT, Peebles & Xie 2023, section 3.2).

    Args:
        x: (B, N, D), any floating dtype.
        shift: (1 or B, 1, D).
        scale: (1 or B, 1, D).
        eps: added to the variance.

    Returns:
        (B, N, D), dtype of `x`; computed in float32 or wider.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(wide), (x.shape[-1],), eps=eps)
    return (normed * (1 + scale.to(wide)) + shift.to(wide)).to(x.dtype)


def gated_residual_reference(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate * y.

    Args:
        x: (B, N, D), any floating dtype.
        gate: (1 or B, 1, D).
        y: (B, N, D).

    Returns:
        (B, N, D), dtype of `x`; computed in float32 or wider.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) + gate.to(wide) * y.to(wide)).to(x.dtype)
