"""Normalisation modules used by several models. The arithmetic is in `sana.ops`."""

import torch
from torch import Tensor, nn

from sana.ops import rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square normalisation of the last axis, computed in float32.

    Args:
        dim: size of the last axis.
        scale_factor: initial value of every weight.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, scale_factor: float = 1.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.full((dim,), float(scale_factor)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D), dtype of `x`."""
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
