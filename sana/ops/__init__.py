"""Operators as functions, tensors in and tensors out: what a model calls. Modules and weights are not here.

Every operator has a plain form in its `reference.py`, the judge of the others, and takes `backend`: see `backend.py`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sana.ops.backend import choose
from sana.ops.linear.cpu import linear_cpu
from sana.ops.linear_attention.cpu import linear_attention_cpu
from sana.ops.linear_attention.reference import linear_attention_reference, relu_linear_attention
from sana.ops.mix_ffn.cpu import mix_ffn_cpu
from sana.ops.mix_ffn.reference import Activation, WeightBias
from sana.ops.mix_ffn.reference import mix_ffn as mix_ffn_reference
from sana.ops.mix_ffn.reference import pre_glu_conv as pre_glu_conv_reference
from sana.ops.modulation.cpu import modulated_layer_norm_cpu
from sana.ops.rms_norm.function import rms_norm_2d
from sana.ops.rms_norm.reference import rms_norm

__all__ = [
    "gated_residual", "linear", "linear_attention", "mix_ffn", "modulated_layer_norm", "pre_glu_conv",
    "relu_linear_attention", "rms_norm", "rms_norm_2d",
]  # fmt: skip


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """x @ weight^T + bias. "triton" is PyTorch's own product here: no kernel of ours is better at it.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,) or None.
        backend: see `sana.ops.backend`.

    Returns:
        (..., N).
    """
    if backend != "triton" and choose(backend, x) == "cpu":
        return linear_cpu(x, weight, bias)
    return F.linear(x, weight, bias)


def linear_attention(
    qkv: Tensor, num_heads: int, *, backend: str = "auto", inplace: bool = False, fp32: bool = False, **options: Any
) -> Tensor:
    """ReLU linear attention on packed projections, with optional RMSNorm of queries and keys (Sana, section 2.2).

    Args:
        qkv: (B, N, 3 * D) with [query | key | value] of all heads.
        num_heads: h; D = h * d.
        backend: see `sana.ops.backend`.
        inplace: whether the memory of `qkv` may be used.
        fp32: whether products of 16-bit tensors are float32, as in the reference; a CPU else makes them in 16 bits.
        **options: `eps`, `q_weight`, `k_weight` (D,) and `norm_eps`, see `linear_attention_reference`.

    Returns:
        (B, N, D), dtype of `qkv`.
    """
    chosen = choose(backend, qkv)
    if chosen == "triton":
        from sana.ops.linear_attention.function import linear_attention_triton

        wide = qkv.float() if fp32 else qkv
        return linear_attention_triton(wide, num_heads, **options).to(qkv.dtype)
    both_or_none = (options.get("q_weight") is None) == (options.get("k_weight") is None)
    if chosen == "cpu" and both_or_none and (fp32 or qkv.dtype != torch.float16):  # where eps is 0
        return linear_attention_cpu(qkv, num_heads, inplace=inplace, fp32=fp32, **options)
    return linear_attention_reference(qkv, num_heads, **options)


def mix_ffn(
    x: Tensor,
    grid: tuple[int, int],
    inverted: WeightBias,
    depth: WeightBias,
    point: WeightBias,
    *,
    act: Activation = F.silu,
    gate_act: Activation = F.silu,
    dilation: int = 1,
    recompute: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The Mix-FFN of Sana; for the other arguments see `sana.ops.mix_ffn.reference`.

    Args:
        recompute: whether `x` alone is kept for the gradient, and what is wider computed again: the same bits.

    Raises:
        ValueError: Triton is asked for with other activations than SiLU, or a dilated convolution.
    """
    chosen, fused = choose(backend, x), _is_silu(act) and _is_silu(gate_act)
    if chosen == "cpu" and fused:
        return mix_ffn_cpu(x, grid, inverted, depth, point, dilation=dilation)
    if chosen == "triton":
        if not fused or dilation != 1:
            raise ValueError("the Triton Mix-FFN has SiLU twice and a 3x3 convolution without dilation; use 'auto'.")
        from sana.ops.mix_ffn.function import mix_ffn_triton

        return mix_ffn_triton(x, grid, inverted, depth, point, recompute=recompute)

    def plain(tokens: Tensor) -> Tensor:
        return mix_ffn_reference(tokens, grid, inverted, depth, point, act=act, gate_act=gate_act, dilation=dilation)

    if recompute and torch.is_grad_enabled():
        return checkpoint(plain, x, use_reentrant=False, preserve_rng_state=False)
    return plain(x)


def pre_glu_conv(
    x: Tensor,
    grid: tuple[int, int],
    inverted: WeightBias,
    depth: WeightBias,
    point: WeightBias,
    *,
    gate_act: Activation = F.silu,
    act: Activation = F.silu,
    backend: str = "auto",
) -> Tensor:
    """The feed-forward network with its gate before the convolution; see `sana.ops.mix_ffn.reference.pre_glu_conv`.

    Raises:
        ValueError: Triton is asked for with other activations than SiLU.
    """
    if choose(backend, x) != "triton":
        return pre_glu_conv_reference(x, grid, inverted, depth, point, gate_act=gate_act, act=act)
    if not (_is_silu(gate_act) and _is_silu(act)):
        raise ValueError("the Triton MBConvPreGLU has SiLU on the gate and after its convolution; use 'mbconvpreglu'.")
    from sana.ops.mix_ffn.function import pre_glu_conv_triton

    return pre_glu_conv_triton(x, grid, inverted, depth, point)


def modulated_layer_norm(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, backend: str = "auto"
) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift (adaLN of DiT); (B, N, D) with (1 or B, 1, D) twice -> (B, N, D)."""
    chosen = choose(backend, x)
    if chosen == "cpu":
        return modulated_layer_norm_cpu(x, shift, scale, eps)
    if chosen == "triton":
        from sana.ops.modulation.function import modulated_layer_norm_triton

        return modulated_layer_norm_triton(x, shift, scale, eps)
    return torch.addcmul(shift, F.layer_norm(x, (x.shape[-1],), eps=eps), 1 + scale)


def gated_residual(x: Tensor, gate: Tensor, y: Tensor, *, backend: str = "auto") -> Tensor:
    """x + gate * y; (B, N, D), (1 or B, 1, D) and (B, N, D) -> (B, N, D)."""
    if choose(backend, x) == "triton":
        from sana.ops.modulation.function import gated_residual_triton

        return gated_residual_triton(x, gate, y)
    return torch.addcmul(x, gate, y)


def _is_silu(act: Activation) -> bool:
    return act is F.silu or isinstance(act, nn.SiLU)
