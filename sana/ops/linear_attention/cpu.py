"""ReLU linear attention for inference on a CPU: the reference's arithmetic, with fewer and smaller copies."""

import torch
from torch import Tensor

from sana.ops.rms_norm.reference import rms_norm


def linear_attention_cpu(
    qkv: Tensor,
    num_heads: int,
    *,
    eps: float = 1e-8,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    inplace: bool = False,
) -> Tensor:
    """`linear_attention_reference` without gradients; see there for the arguments.

    Heads are strided views of the packed tensor, which products of matrices can read; the quotient is written where the
    next layer wants it.

    Args:
        inplace: whether the memory of `qkv` may be used.

    Returns:
        (B, N, h * d), dtype of `qkv`.
    """
    width = qkv.shape[-1] // 3
    query, key, value = qkv.split(width, dim=-1)
    if q_weight is not None:
        query = rms_norm(query, q_weight, norm_eps)
    if k_weight is not None:
        key = rms_norm(key, k_weight, norm_eps)
    query = query.relu_() if inplace or q_weight is not None else query.relu()
    key = key.relu_() if inplace or k_weight is not None else key.relu()
    out = qkv.new_empty(*qkv.shape[:2], num_heads, width // num_heads)
    for row, result in enumerate(out):
        q, k, v = (
            part[row].unflatten(-1, (num_heads, -1)).transpose(0, 1) for part in (query, key, value)
        )  # (h, N, d)
        numerator = torch.bmm(q, torch.bmm(k.transpose(1, 2), v))
        denominator = torch.bmm(q, k.sum(dim=1).unsqueeze(-1)).add_(eps)
        torch.div(numerator.transpose(0, 1), denominator.transpose(0, 1), out=result)
    return out.flatten(2)
