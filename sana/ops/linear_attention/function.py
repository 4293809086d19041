"""`linear_attention_triton`: checks, and the kernels as one differentiable operator that torch.compile keeps whole."""

from typing import Any

import torch
from torch import Tensor

from sana.ops.backend import require_triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 128


def linear_attention_triton(
    qkv: Tensor,
    num_heads: int,
    *,
    eps: float = 1e-8,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> Tensor:
    """ReLU linear attention in fused Triton kernels: one read of qkv, one write, sums in float32 (Sana, section 2.2).

    The same function as `linear_attention_reference`. Two runs give the same bits, and an image's output and gradient
    do not depend on the batch it is in. A query without a positive entry gives exactly 0 and gets zero gradients.

    Args:
        qkv: (B, N, 3 * h * d), the queries of all heads, then the keys, then the values; float32, float16 or bfloat16,
            d at most 128. Any strides of batch and tokens are read in place.
        num_heads: number h of heads.
        eps: added to the denominator, positive.
        q_weight: (h * d,), weight of an RMSNorm of the queries over ALL heads before the ReLU. With `k_weight` or not
            at all.
        k_weight: the same of the keys.
        norm_eps: eps of those norms.

    Returns:
        (B, N, h * d), contiguous, dtype of `qkv`.

    Raises:
        TritonUnavailableError: Triton cannot run on `qkv`.
        ValueError: shapes, dtypes or devices do not fit.
    """
    _check(qkv, num_heads, eps, q_weight, k_weight)
    if qkv.stride(-1) != 1:
        qkv = qkv.contiguous()
    return _forward(qkv, num_heads, eps, q_weight, k_weight, norm_eps)[0]


def _check(qkv: Tensor, num_heads: int, eps: float, q_weight: Tensor | None, k_weight: Tensor | None) -> None:
    if qkv.dtype not in DTYPES:
        raise ValueError(
            f"qkv must be float32, float16 or bfloat16, not {qkv.dtype}; use backend='reference' for others."
        )
    if qkv.dim() != 3 or num_heads < 1 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(f"qkv must be (B, N, 3 * {num_heads} * d) for {num_heads} heads, not {tuple(qkv.shape)}.")
    if 0 in qkv.shape:
        raise ValueError(f"qkv must not be empty, and its shape is {tuple(qkv.shape)}.")
    width = qkv.shape[2] // 3
    if width // num_heads > MAX_HEAD_DIM:
        raise ValueError(
            f"The kernels take head dims up to {MAX_HEAD_DIM}, not {width // num_heads}; use more heads or "
            "backend='reference'."
        )
    if not eps > 0:
        raise ValueError(f"eps must be positive, not {eps}: a query without positive entries would be divided by 0.")
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight must be given together or not at all.")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and tuple(weight.shape) != (width,):
            raise ValueError(
                f"{name} must be ({width},), one number for each channel of all heads, not {tuple(weight.shape)}."
            )
        if weight is not None and weight.device != qkv.device:
            raise ValueError(f"{name} is on {weight.device} and qkv on {qkv.device}; they must be on one device.")


@torch.library.custom_op("sana::linear_attention", mutates_args=())
def _forward(
    qkv: Tensor, num_heads: int, eps: float, q_weight: Tensor | None, k_weight: Tensor | None, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (output, sums, row scales) of `launch_forward`."""
    require_triton(qkv)
    from sana.ops.linear_attention.forward import launch_forward

    with torch.cuda.device_of(qkv):
        return launch_forward(qkv, num_heads, eps, _dense(q_weight), _dense(k_weight), norm_eps)


@_forward.register_fake
def _forward_fake(
    qkv: Tensor, num_heads: int, eps: float, q_weight: Tensor | None, k_weight: Tensor | None, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    images, tokens, packed = qkv.shape
    width = packed // 3
    head_dim = width // num_heads
    sums = qkv.new_empty((images, num_heads, head_dim + 1, head_dim), dtype=torch.float32)
    scale = qkv.new_empty((0,) if q_weight is None else (2, images, tokens), dtype=torch.float32)
    return qkv.new_empty((images, tokens, width)), sums, scale


@torch.library.custom_op("sana::linear_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    qkv: Tensor,
    sums: Tensor,
    scale: Tensor,
    num_heads: int,
    eps: float,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of qkv and of both weights, those in float32, empty without norms."""
    from sana.ops.linear_attention.backward import launch_backward

    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    with torch.cuda.device_of(qkv):
        return launch_backward(grad, qkv, sums, scale, num_heads, eps, _dense(q_weight), _dense(k_weight))


@_backward.register_fake
def _backward_fake(
    grad: Tensor,
    qkv: Tensor,
    sums: Tensor,
    scale: Tensor,
    num_heads: int,
    eps: float,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    width = 0 if q_weight is None else q_weight.shape[0]
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), sums.new_empty((2, width))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    qkv, ctx.num_heads, ctx.eps, q_weight, k_weight, _ = inputs
    _, sums, scale = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, sums, scale, q_weight, k_weight)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    qkv, sums, scale, q_weight, k_weight = ctx.saved_tensors
    grad_qkv, weights = _backward(grad, qkv, sums, scale, ctx.num_heads, ctx.eps, q_weight, k_weight)
    if q_weight is None:
        return grad_qkv, None, None, None, None, None
    return grad_qkv, None, None, weights[0].to(q_weight.dtype), weights[1].to(k_weight.dtype), None


_forward.register_autograd(_differentiate, setup_context=_keep)


def _dense(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()
