"""Operators as one would write them in plain PyTorch, and in chunks: what ours are timed against. No tuning here."""

import torch
import torch.nn.functional as F
from torch import Tensor

WeightBias = tuple[Tensor, Tensor | None]
CHUNK = 64  # tokens, as in flash-linear-attention's kernels


def linear_attention(qkv: Tensor, num_heads: int, eps: float = 1e-8) -> Tensor:
    """ReLU linear attention as the official code has it: a row of ones beside the values makes the denominator.

    Args:
        qkv: (B, N, 3 * D) with [query | key | value].
        num_heads: h.
        eps: added to the denominator.

    Returns:
        (B, N, D).
    """
    query, key, value = (
        part.unflatten(-1, (num_heads, -1)).permute(0, 2, 3, 1) for part in qkv.chunk(3, dim=-1)
    )  # (B, h, d, N)
    query, key = F.relu(query), F.relu(key)
    value = F.pad(value, (0, 0, 0, 1), value=1.0)  # (B, h, d + 1, N)
    out = (value @ key.transpose(-1, -2)).float() @ query.float()
    return (out[:, :, :-1] / (out[:, :, -1:] + eps)).permute(0, 3, 1, 2).flatten(2).to(qkv.dtype)


def chunked_linear_attention(qkv: Tensor, num_heads: int, eps: float = 1e-8) -> Tensor:
    """The same in chunks of tokens with a float32 state: one pass gathers keys and values, one reads them out."""
    query, key, value = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    batch, heads, _, width = query.shape
    state = qkv.new_zeros(batch, heads, width, width, dtype=torch.float32)
    total = qkv.new_zeros(batch, heads, width, 1, dtype=torch.float32)
    for keys, values in zip(key.split(CHUNK, dim=2), value.split(CHUNK, dim=2), strict=True):
        keys = F.relu(keys).float()
        state = state + keys.transpose(-1, -2) @ values.float()
        total = total + keys.sum(dim=2).unsqueeze(-1)
    parts = []
    for queries in query.split(CHUNK, dim=2):
        queries = F.relu(queries).float()
        parts.append((queries @ state) / (queries @ total + eps))
    return torch.cat(parts, dim=2).transpose(1, 2).flatten(2).to(qkv.dtype)


def mix_ffn(x: Tensor, grid: tuple[int, int], inverted: WeightBias, depth: WeightBias, point: WeightBias) -> Tensor:
    """Mix-FFN as the official code and diffusers have it, channels first; arguments as `sana.ops.mix_ffn`."""
    image = x.transpose(1, 2).unflatten(2, grid).contiguous()
    hidden = F.silu(F.conv2d(image, *inverted))
    hidden = F.conv2d(hidden, *depth, padding=1, groups=hidden.shape[1])
    value, gate = hidden.chunk(2, dim=1)
    return F.conv2d(value * F.silu(gate), *point).flatten(2).transpose(1, 2)


def rms_norm_2d(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """RMS norm over the channels of (B, C, H, W), channels moved to the end and back as diffusers does it."""
    rows = x.movedim(1, -1)
    scale = torch.rsqrt(rows.float().pow(2).mean(-1, keepdim=True) + eps)
    return ((rows * scale).to(x.dtype) * weight + bias).movedim(-1, 1)


def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift."""
    return F.layer_norm(x, (x.shape[-1],), eps=eps) * (1 + scale) + shift
