"""Self-attention (linear and softmax) and cross-attention on captions. Norms, gates and residuals are in `block.py`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.models.layers.linear import Linear
from sana.models.layers.norms import RMSNorm
from sana.models.transformer.position import Rotary, apply_rotary
from sana.ops import linear_attention, relu_linear_attention
from sana.ops.backend import BACKENDS, choose
from sana.ops.linear_attention.wide import attend_fp32, relu_linear_attention_fp32

KeyValue = tuple[Tensor, Tensor]

FP16_MAX = 65504.0
FEW_SCORES = 2**18  # up to so many, plain products are faster on a CPU than the fused kernel


class SelfAttention(nn.Module):
    """What all kinds of self-attention share: projections, heads, and identity attention for the last rows.

    Args:
        dim: width D of the tokens.
        num_heads: number h of heads.
        qkv_bias: whether the input projection has a bias.
        clip_fp16: whether the output is clipped to +-65504, which is trained into checkpoints of float16 lineage.
    """

    backend = "auto"

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, clip_fp16: bool = False) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} must be a multiple of the number of heads {num_heads}.")
        self.num_heads = num_heads
        self.clip_fp16 = clip_fp16
        self.fp32_attention = False
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, rotary: Rotary | None = None, identity_rows: int = 0) -> Tensor:
        """Mixes tokens of each row.

        Args:
            x: (B, N, D).
            rotary: angles of the N positions, or None.
            identity_rows: so many rows at the END of the batch use the identity instead of the attention map, the
                perturbed branch of PAG (Ahn et al. 2024): proj(W_v x).

        Returns:
            (B, N, D), dtype of `x`.
        """
        attending = x.shape[0] - identity_rows
        parts = []
        if attending:
            parts.append(self._attend(x[:attending] if identity_rows else x, rotary))
        if identity_rows:
            parts.append(self._project_value(x[attending:]))
        mixed = parts[0] if len(parts) == 1 else torch.cat(parts)
        out = self.proj(mixed)
        return out.clamp(-FP16_MAX, FP16_MAX) if self.clip_fp16 else out

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rotary: Rotary | None) -> Tensor:
        """(B, h, N, d) three times -> (B, h, N, d)."""
        raise NotImplementedError

    def _attend(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)  # (B, N, D) each
        query, key = self.q_norm(query).to(value.dtype), self.k_norm(key).to(value.dtype)
        heads = [self._heads(tensor) for tensor in (query, key, value)]
        if self.fp32_attention:
            with _autocast_off(x):
                out = self._attend_in_fp32(heads, rotary)
        else:
            out = self.attend(*heads, rotary)
        return out.to(value.dtype).transpose(1, 2).flatten(2)  # (B, N, D)

    def _attend_in_fp32(self, heads: list[Tensor], rotary: Rotary | None) -> Tensor:
        return self.attend(*(tensor.float() for tensor in heads), rotary)

    def _project_value(self, x: Tensor) -> Tensor:
        if not isinstance(self.qkv, nn.Linear):  # quantised: its weight cannot be cut
            return self.qkv(x).chunk(3, dim=-1)[2]
        width = self.qkv.out_features // 3
        bias = None if self.qkv.bias is None else self.qkv.bias[2 * width :]
        return F.linear(x, self.qkv.weight[2 * width :], bias)

    def _heads(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, h, N, d)


class LinearAttention(SelfAttention):
    """ReLU linear attention (Sana, section 2.2; official `LiteLA`).

    Args:
        dim: width D of the tokens.
        num_heads: number h of heads.
        eps: added to the denominator.
        qk_norm: RMSNorm of queries and keys over ALL heads.
        norm_eps: eps of those norms.
        clip_fp16: see `SelfAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        eps: float = 1e-8,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        clip_fp16: bool = False,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias=False, clip_fp16=clip_fp16)
        self.eps = eps
        if qk_norm:
            self.q_norm = RMSNorm(dim, eps=norm_eps)
            self.k_norm = RMSNorm(dim, eps=norm_eps)

    def _attend(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        if self.backend == "triton" and rotary is not None:
            raise ValueError("the Triton linear attention does not rotate queries and keys; use attn_type 'linear'.")
        if rotary is not None or choose(self.backend, x) == "reference":
            return super()._attend(x, rotary)
        qkv = self.qkv(x)
        weights = {f"{name}_weight": norm.weight for name, norm in self._norms().items()}
        norm_eps = next((norm.eps for norm in self._norms().values()), 1e-5)
        options = {"eps": self.eps, "norm_eps": norm_eps, "backend": self.backend, "inplace": True, **weights}
        return linear_attention(qkv, self.num_heads, fp32=self.fp32_attention, **options)

    def _norms(self) -> dict[str, RMSNorm]:
        norms = {"q": self.q_norm, "k": self.k_norm}
        return {name: norm for name, norm in norms.items() if isinstance(norm, RMSNorm)}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rotary: Rotary | None) -> Tensor:
        if rotary is not None:  # before the ReLU, so that the denominator stays a sum of positive terms
            query, key = apply_rotary(query, rotary), apply_rotary(key, rotary)
        return relu_linear_attention(query, key, value, self.eps)

    def _attend_in_fp32(self, heads: list[Tensor], rotary: Rotary | None) -> Tensor:
        if _keeps_all(heads[2]):
            return super()._attend_in_fp32(heads, rotary)

        def turn(some: Tensor, span: slice) -> Tensor:
            return some if rotary is None else apply_rotary(some, (rotary[0][span], rotary[1][span]))

        return relu_linear_attention_fp32(*heads, self.eps, turn)


class SoftmaxAttention(SelfAttention):
    """Softmax attention through PyTorch's fused kernel (`attn_type` "flash" and "vanilla").

    Args:
        dim: width D of the tokens.
        num_heads: number h of heads.
        qk_norm: LayerNorm, with bias, of queries and keys over all heads.
        clip_fp16: see `SelfAttention`.
    """

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False, clip_fp16: bool = False) -> None:
        super().__init__(dim, num_heads, qkv_bias=True, clip_fp16=clip_fp16)
        if qk_norm:
            self.q_norm = nn.LayerNorm(dim)
            self.k_norm = nn.LayerNorm(dim)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rotary: Rotary | None) -> Tensor:
        if rotary is not None:
            query, key = apply_rotary(query, rotary), apply_rotary(key, rotary)
        return F.scaled_dot_product_attention(query, key, value)


class CrossAttention(nn.Module):
    """Softmax attention of image tokens on text tokens (official `MultiHeadCrossAttention`).

    Args:
        dim: width D of the tokens.
        num_heads: number h of heads.
        qk_norm: RMSNorm of queries and keys over all heads.
        norm_eps: eps of those norms.
    """

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False, norm_eps: float = 1e-6) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} must be a multiple of the number of heads {num_heads}.")
        self.num_heads = num_heads
        self.fp32_attention = False
        self.q_linear = Linear(dim, dim)
        self.kv_linear = Linear(dim, 2 * dim)
        self.proj = Linear(dim, dim)
        self.q_norm = RMSNorm(dim, eps=norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim, eps=norm_eps) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, cond: Tensor | KeyValue, mask: Tensor | None = None) -> Tensor:
        """Reads the text.

        Args:
            x: (B, N, D) image tokens.
            cond: (B, L, D) or (B, 1, L, D) text tokens; or their keys and values, made by `key_value`.
            mask: None, or (B, L) with non-zero for tokens that may be read. A row of zeros means that no token is
                preferred: all are read, as the official bias of -10000 on every logit has it.

        Returns:
            (B, N, D), dtype of `x`.
        """
        query = self._heads(self.q_norm(self.q_linear(x)))
        key, value = cond if isinstance(cond, tuple) else self.key_value(cond)
        readable = None if mask is None else readable_tokens(mask)[:, None, None, :]  # (B, 1, 1, L)
        if self.fp32_attention:
            with _autocast_off(x):
                out = self._attend_in_fp32(query, key.float(), value.float(), readable)
        else:
            out = self.attend(query, key, value, readable)
        del query
        return self.proj(out.to(x.dtype).transpose(1, 2).flatten(2))

    def _attend_in_fp32(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if _keeps_all(query):
            return self.attend(query.float(), key, value, mask)
        return attend_fp32(query, lambda some: self.attend(some, key, value, mask))

    def key_value(self, cond: Tensor) -> KeyValue:
        """Text tokens (B, L, D) or (B, 1, L, D) -> keys and values (B, h, L, d), which serve every step of sampling."""
        key, value = self.kv_linear(cond.flatten(1, -2)).chunk(2, dim=-1)
        return self._heads(self.k_norm(key)), self._heads(value)

    def _heads(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, h, L, d)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """(B, h, N, d), (B, h, L, d) twice, boolean (B, 1, 1, L) -> (B, h, N, d)."""
        scores = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
        if scores <= FEW_SCORES and query.dtype == torch.float32 and choose("auto", query) == "cpu":
            return attend_by_products(query, key, value, mask)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class VanillaCrossAttention(CrossAttention):
    """`CrossAttention` as plain products, which `torch.func.jvp` accepts (`MultiHeadCrossVallinaAttention`)."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return attend_by_products(query, key, value, mask)


def attend_by_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention without a fused kernel; (B, h, N, d), (B, h, L, d) twice, mask (B, 1, 1, L) -> (B, h, N, d)."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)  # (B, h, N, L)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value


def _keeps_all(x: Tensor) -> bool:
    """Whether float32 copies of all tokens are kept or fused anyway, or not needed."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling() or x.element_size() >= 4


def _autocast_off(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def readable_tokens(mask: Tensor) -> Tensor:
    """(B, L) numbers -> (B, L) booleans; a row without any readable token becomes all True."""
    readable = mask != 0
    return readable | ~readable.any(dim=-1, keepdim=True)


def set_fp32_attention(model: nn.Module, enabled: bool = True) -> None:
    """Makes every attention of a model compute its products in float32, whatever the dtype of the weights."""
    for module in model.modules():
        if isinstance(module, (SelfAttention, CrossAttention)):
            module.fp32_attention = enabled


def set_backend(model: nn.Module, backend: str) -> None:
    """Makes every operator of a model that has a choice use a backend of `sana.ops.backend`.

    Raises:
        ValueError: the name is unknown.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}.")
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = backend
