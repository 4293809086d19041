"""RMS normalisation over channels for inference on a CPU: few passes over memory, in place where allowed."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_2d_cpu(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, act: str | None = None, *, inplace: bool = False
) -> Tensor:
    """`sana.ops.rms_norm_2d` without the gradients; fast for tensors that have channels last in memory.

    Args:
        x: (B, C, H, W), any floating dtype; 16-bit values are computed with in float32.
        weight: (C,) or None.
        bias: (C,) or None.
        eps: added to the mean square.
        act: None, "silu" or "relu".
        inplace: the result may take the memory of `x`.

    Returns:
        (B, C, H, W), dtype and memory format of `x`.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.linalg.vector_norm(wide, dim=1, keepdim=True).square_().div_(x.shape[1]).add_(eps).rsqrt_()
    own = inplace or wide is not x
    out = wide.mul_(scale) if own else wide * scale
    weight, bias = (None if tensor is None else tensor.to(wide.dtype).view(-1, 1, 1) for tensor in (weight, bias))
    if weight is not None and bias is not None:
        torch.addcmul(bias, out, weight, out=out)
    elif weight is not None:
        out.mul_(weight)
    elif bias is not None:
        out.add_(bias)
    if act is not None:
        out = out.relu_() if act == "relu" else F.silu(out, inplace=True)
    return out.to(x.dtype)
