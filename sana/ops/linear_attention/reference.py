"""ReLU linear attention in plain PyTorch: the judge of every faster version. Projections and rotation are not here."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sana.ops.rms_norm.reference import rms_norm


def relu_linear_attention(query: Tensor, key: Tensor, value: Tensor, eps: float = 1e-8) -> Tensor:
    """Attention with the kernel relu(q) . relu(k), at a cost linear in the number of tokens (Sana, section 2.2).

    out_i = relu(q_i) (sum_j relu(k_j)^T v_j) / (relu(q_i) . sum_j relu(k_j) + eps)

    A query without any positive entry gives exactly 0. The eps is trained in, so it stays 1e-8.

    Args:
        query: (B, h, N, d), before the ReLU.
        key: (B, h, N, d), before the ReLU.
        value: (B, h, N, d).
        eps: added to the denominator.

    Returns:
        (B, h, N, d). The products have the inputs' dtype, the division is done in float32 (float64 for float64).
    """
    query, key = F.relu(query), F.relu(key)
    key_value = key.transpose(-1, -2) @ value  # (B, h, d, d)
    key_sum = key.sum(dim=-2).unsqueeze(-1)  # (B, h, d, 1)
    numerator, denominator = query @ key_value, query @ key_sum
    if numerator.element_size() < 4:
        numerator, denominator = numerator.float(), denominator.float()
    return numerator / (denominator + eps)


def linear_attention_reference(
    qkv: Tensor,
    num_heads: int,
    *,
    eps: float = 1e-8,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> Tensor:
    """`relu_linear_attention` of packed queries, keys and values in float32: the judge of the Triton kernels.

    Args:
        qkv: (B, N, 3 * h * d), the queries of all heads, then the keys, then the values.
        num_heads: number h of heads.
        eps: added to the denominator.
        q_weight: (h * d,), weight of an RMSNorm of the queries over ALL heads before the ReLU; None for no norm.
        k_weight: the same of the keys.
        norm_eps: eps of those norms.

    Returns:
        (B, N, h * d), dtype of `qkv`; computed in float32 (float64 for float64).
    """
    query, key, value = qkv.to(torch.promote_types(qkv.dtype, torch.float32)).chunk(3, dim=-1)
    if q_weight is not None:
        query = rms_norm(query, q_weight, norm_eps)
    if k_weight is not None:
        key = rms_norm(key, k_weight, norm_eps)
    query, key, value = (tensor.unflatten(-1, (num_heads, -1)).transpose(1, 2) for tensor in (query, key, value))
    out = relu_linear_attention(query, key, value, eps)  # (B, h, N, d)
    return out.transpose(1, 2).flatten(2).to(qkv.dtype)
