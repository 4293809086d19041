"""ReLU linear attention for inference on a CPU: the reference's arithmetic, with fewer and smaller copies."""

import torch
from torch import Tensor

from sana.ops.chunks import every

CHUNK_BYTES = 2**24  # queries beyond this are normed and multiplied in chunks of tokens, none of them larger
Weights = tuple[Tensor, Tensor] | None  # of the norms of queries and keys


def linear_attention_cpu(
    qkv: Tensor,
    num_heads: int,
    *,
    eps: float = 1e-8,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    inplace: bool = False,
    fp32: bool = False,
) -> Tensor:
    """`linear_attention_reference` without gradients.

    Heads are strided views of the packed tensor, which products of matrices can read; the quotient is written where the
    next layer wants it. Only the result is as large as the queries; what else is made of many tokens is made in chunks.

    Args:
        qkv, num_heads, eps, q_weight, k_weight, norm_eps: as there; the norm's weights are given together.
        inplace: whether the memory of `qkv` may be used.
        fp32: whether products of 16-bit tensors are float32, as in the reference; else they are 16-bit too.

    Returns:
        (B, N, h * d), dtype of `qkv`.
    """
    width = qkv.shape[-1] // 3
    if fp32 and qkv.element_size() < 4:
        weights = None if q_weight is None or k_weight is None else (q_weight, k_weight)
        return _in_fp32(qkv, num_heads, eps, weights, norm_eps)
    tokens = max(1, CHUNK_BYTES // (width * qkv.element_size()))  # at once
    both, value = qkv.split([2 * width, width], dim=-1)
    both = (both if inplace else both.clone()).unflatten(-1, (2, width))  # queries and keys (B, N, 2, D)
    if q_weight is not None and k_weight is not None:
        weights = torch.stack([q_weight, k_weight])
        for part in every(both.split(tokens, dim=1)):
            _norm(part, weights, norm_eps)
    query, key = both.relu_().unbind(dim=2)
    out = qkv.new_empty(*qkv.shape[:2], num_heads, width // num_heads)
    for row, result in enumerate(out):
        heads = (part[row].unflatten(-1, (num_heads, -1)).transpose(0, 1) for part in (query, key, value))
        q, k, v = heads  # (h, N, d)
        key_value, key_sum = torch.bmm(k.transpose(1, 2), v), k.sum(dim=1).unsqueeze(-1)
        for chunk, quotient in zip(every(q.split(tokens, dim=1)), every(result.split(tokens)), strict=True):
            numerator, denominator = torch.bmm(chunk, key_value), torch.bmm(chunk, key_sum).add_(eps)
            torch.div(numerator.transpose(0, 1), denominator.transpose(0, 1), out=quotient)
    return out.flatten(2)


def _in_fp32(qkv: Tensor, num_heads: int, eps: float, norms: Weights, norm_eps: float) -> Tensor:
    """Widens queries, keys and values in chunks of tokens, so that no copy of all of them is made."""
    width = qkv.shape[-1] // 3
    tokens = max(1, CHUNK_BYTES // (width * 4))  # at once
    out = qkv.new_empty(*qkv.shape[:2], num_heads, width // num_heads)

    def widened(packed: Tensor, part: int) -> Tensor:  # (n, 3 * D) -> (h, n, d); part 0: queries, 1: keys, 2: values
        wide = packed[:, part * width : (part + 1) * width].float()
        if part < 2 and norms is not None:
            _norm(wide, norms[part], norm_eps)
        wide = wide if part == 2 else wide.relu_()
        return wide.unflatten(-1, (num_heads, -1)).transpose(0, 1)

    for row, result in zip(qkv, out, strict=True):
        key_value = key_sum = None
        for packed in every(row.split(tokens)):
            key, value = widened(packed, 1), widened(packed, 2)
            product, total = torch.bmm(key.transpose(1, 2), value), key.sum(dim=1).unsqueeze(-1)
            key_value = product if key_value is None else key_value.add_(product)
            key_sum = total if key_sum is None else key_sum.add_(total)
        for packed, quotient in zip(every(row.split(tokens)), every(result.split(tokens)), strict=True):
            query = widened(packed, 0)
            numerator, denominator = torch.bmm(query, key_value), torch.bmm(query, key_sum).add_(eps)
            torch.div(numerator.transpose(0, 1), denominator.transpose(0, 1), out=quotient)
    return out.flatten(2)


def _norm(x: Tensor, weights: Tensor, eps: float) -> None:
    """RMSNorm over all heads of queries and keys (B, N, 2, D) or of either, in place, in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    wide.mul_(norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()).mul_(weights)
    if wide is not x:
        x.copy_(wide)
