"""Attention of 16-bit heads in float32, without a float32 copy of all queries; for inference."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sana.ops.chunks import every

CHUNK_BYTES = 2**24  # of the float32 queries of one image that are made at once

Turn = Callable[[Tensor, slice], Tensor]  # of (B, h, n, d) and which of the N tokens these are


def relu_linear_attention_fp32(
    query: Tensor, key: Tensor, value: Tensor, eps: float = 1e-8, turn: Turn | None = None
) -> Tensor:
    """`relu_linear_attention` in float32, rounded once; tokens are widened in chunks that do not depend on the batch.

    The same bits where there is one chunk; else sums over tokens are added up in another order.

    Args:
        query, key, value: (B, h, N, d), before the ReLU, 16-bit.
        eps: added to the denominator.
        turn: what is done to queries and keys in float32, before the ReLU: the rotation.

    Returns:
        (B, h, N, d), dtype of `value`, laid out so that joining the heads copies nothing.
    """
    spans = _spans(query)

    def widened(x: Tensor, span: slice) -> Tensor:
        wide = x[:, :, span].float()
        return F.relu(wide if turn is None else turn(wide, span))

    key_value = key_sum = None
    for span in spans:
        some = widened(key, span)
        product, total = some.transpose(-1, -2) @ value[:, :, span].float(), some.sum(dim=-2).unsqueeze(-1)
        del some
        key_value = product if key_value is None else key_value.add_(product)  # (B, h, d, d)
        key_sum = total if key_sum is None else key_sum.add_(total)  # (B, h, d, 1)
    out = _joined(query)
    for span in spans:
        some = widened(query, span)
        numerator, denominator = some @ key_value, some @ key_sum
        del some
        torch.div(numerator, denominator.add_(eps), out=out[:, :, span])
        del numerator, denominator
    return out


def attend_fp32(query: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """What `attend` makes of 16-bit queries (B, h, N, d) in float32, given to it in chunks; laid out as above."""
    out = _joined(query)
    for span in _spans(query):
        out[:, :, span] = attend(query[:, :, span].float())
    return out


def _spans(query: Tensor) -> list[slice]:
    """About equal chunks of the tokens of (B, h, N, d)."""
    _, heads, count, dim = query.shape
    chunks = -(-count * heads * dim * 4 // CHUNK_BYTES)
    size = -(-count // chunks)
    return list(every([slice(start, min(start + size, count)) for start in range(0, count, size)]))


def _joined(query: Tensor) -> Tensor:
    batch, heads, count, dim = query.shape
    return query.new_empty(batch, count, heads, dim).transpose(1, 2)
