"""adaLN for inference on a CPU: one pass over the tokens each, where the whole batch shares shift, scale and gate."""

import torch
import torch.nn.functional as F
from torch import Tensor


def modulated_layer_norm_cpu(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, as a LayerNorm with weight and bias if one row serves all.

    Args:
        x: (B, N, D).
        shift: (1 or B, 1, D).
        scale: (1 or B, 1, D).
        eps: added to the variance.

    Returns:
        (B, N, D).
    """
    if scale.shape[0] == shift.shape[0] == 1:
        return F.layer_norm(x, (x.shape[-1],), 1 + scale.flatten(), shift.flatten(), eps)
    return torch.addcmul(shift, F.layer_norm(x, (x.shape[-1],), eps=eps), 1 + scale)
