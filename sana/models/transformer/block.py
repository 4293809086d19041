"""One block of the Linear DiT: self-attention, cross-attention and Mix-FFN with shared time modulation."""

import torch
from torch import Tensor, nn

from sana.models.transformer.architecture import SanaArchitecture
from sana.models.transformer.attention import (
    CrossAttention,
    KeyValue,
    LinearAttention,
    SelfAttention,
    SoftmaxAttention,
    VanillaCrossAttention,
)
from sana.models.transformer.mix_ffn import build_feed_forward
from sana.models.transformer.position import Rotary
from sana.ops import gated_residual, modulated_layer_norm
from sana.ops.backend import plain_kind


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, replaces whole rows by zero and scales the others up.

    Args:
        rate: probability of dropping a row.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...)."""
        if not self.training or self.rate == 0:
            return x
        kept = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1 - self.rate)
        return x * (kept / (1 - self.rate))


class SanaBlock(nn.Module):
    """x + gate * attn(norm(x)), then x + cross_attn(x, text), then x + gate * ffn(norm(x)) (Sana, figure 5).

    Shifts, scales and gates are a learned table plus one projection of the time that all blocks share (PixArt).

    Args:
        architecture: shape and options.
        drop_path: probability, in training, of skipping a modulated branch of a row.
    """

    backend = "auto"

    def __init__(self, architecture: SanaArchitecture, drop_path: float = 0.0) -> None:
        super().__init__()
        dim = architecture.hidden_size
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = build_self_attention(architecture)
        cross_attention = VanillaCrossAttention if architecture.cross_attn_type == "vanilla" else CrossAttention
        self.cross_attn = cross_attention(dim, architecture.num_heads, qk_norm=architecture.cross_norm)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = build_feed_forward(architecture)
        self.drop_path = DropPath(drop_path)
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def forward(
        self,
        x: Tensor,
        y: Tensor | KeyValue,
        t: Tensor,
        mask: Tensor | None = None,
        HW: tuple[int, int] | None = None,
        rotary: Rotary | None = None,
        identity_rows: int = 0,
    ) -> Tensor:
        """Runs the block.

        Args:
            x: (B, N, D) image tokens.
            y: (B, L, D) or (B, 1, L, D) projected captions, or their keys and values in this block.
            t: (B, 6 * D) projected time, or this block's finished table (1 or B, 6, D) from `modulation`.
            mask: (B, L) of readable text tokens, or None.
            HW: grid of the N tokens; None means square.
            rotary: angles for self-attention, or None.
            identity_rows: so many rows at the end of the batch use identity self-attention (PAG).

        Returns:
            (B, N, D).
        """
        grid = HW or (int(x.shape[1] ** 0.5),) * 2
        table = t if t.dim() == 3 else self.modulation(t)
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = table.chunk(6, dim=1)
        mixed = self.attn(self._modulate(self.norm1, x, shift_attn, scale_attn), rotary, identity_rows)
        x = self._add(x, gate_attn, mixed)
        x = x + self.cross_attn(x, y, mask)
        mixed = self.mlp(self._modulate(self.norm2, x, shift_ffn, scale_ffn), grid)
        return self._add(x, gate_ffn, mixed)

    def modulation(self, t: Tensor) -> Tensor:
        """Projected time (B, 6 * D) -> shift, scale and gate of the attention, then of the Mix-FFN (B, 6, D)."""
        return self.scale_shift_table[None] + t.unflatten(-1, (6, -1))

    def _modulate(self, norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return modulated_layer_norm(x, shift, scale, norm.eps, backend=self.backend)

    def _add(self, x: Tensor, gate: Tensor, mixed: Tensor) -> Tensor:
        if self.training and self.drop_path.rate:
            return x + self.drop_path(gate * mixed)
        return gated_residual(x, gate, mixed, backend=self.backend)


def build_self_attention(architecture: SanaArchitecture) -> SelfAttention:
    """Returns the self-attention of one block."""
    dim, clip = architecture.hidden_size, architecture.clip_fp16
    kind, backend = plain_kind(architecture.attn_type)
    if kind == "linear":
        heads = dim // architecture.linear_head_dim
        attention = LinearAttention(dim, heads, qk_norm=architecture.qk_norm, clip_fp16=clip)
        attention.backend = backend
        return attention
    # The official "vanilla" attention takes no qk_norm, and its checkpoints have no such keys.
    qk_norm = architecture.qk_norm and architecture.attn_type == "flash"
    return SoftmaxAttention(dim, architecture.num_heads, qk_norm=qk_norm, clip_fp16=clip)
