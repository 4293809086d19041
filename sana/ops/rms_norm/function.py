"""RMS normalisation over the channels of images: the public operator, and its Triton form with checks and autograd."""

from typing import Any

import torch
from torch import Tensor

from sana.ops.backend import choose, require_triton
from sana.ops.rms_norm import reference
from sana.ops.rms_norm.cpu import rms_norm_2d_cpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def rms_norm_2d(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """act(x / sqrt(mean over channels of x^2 + eps) * weight + bias) at every pixel, in float32 or wider.

    Args:
        x: (B, C, H, W), any floating dtype, contiguous or channels last in memory.
        weight: (C,), or None for no scaling.
        bias: (C,), or None for no shift.
        eps: added to the mean square.
        act: None, "silu" or "relu".
        backend: see `sana.ops.backend`.

    Returns:
        (B, C, H, W), dtype and memory format of `x`.
    """
    if act not in reference.ACTIVATIONS:
        raise ValueError(f"act must be None, 'silu' or 'relu', not {act!r}.")
    chosen = choose(backend, x)
    if chosen == "triton":
        return rms_norm_2d_triton(x, weight, bias, eps, act)
    operator = rms_norm_2d_cpu if chosen == "cpu" else reference.rms_norm_2d
    return operator(x, weight, bias, eps, act)


def rms_norm_2d_triton(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, act: str | None = None
) -> Tensor:
    """The norm and the activation in one kernel, computed in float32, with deterministic gradients.

    Args:
        x: (B, C, H, W) float32, float16 or bfloat16; copied unless contiguous or channels last in memory.
        weight: (C,) or None; of these dtypes, not necessarily that of `x`.
        bias: (C,) or None.
        eps: added to the mean square.
        act: None, "silu" or "relu".

    Returns:
        (B, C, H, W), dtype and memory format of `x`.

    Raises:
        TritonUnavailableError: Triton cannot run on `x`.
        ValueError: shapes, dtypes or devices do not fit.
    """
    _check(x, act, weight=weight, bias=bias)
    tracked = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    return _forward(_dense(x), weight, bias, eps, act, tracked)[0]


def _check(x: Tensor, act: str | None, **parameters: Tensor | None) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be float32, float16 or bfloat16, not {x.dtype}; use backend='reference' for others.")
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"x must be (B, C, H, W) and not empty, not {tuple(x.shape)}.")
    if act not in reference.ACTIVATIONS:
        raise ValueError(f"act must be None, 'silu' or 'relu', not {act!r}.")
    for name, tensor in parameters.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != (x.shape[1],):
            raise ValueError(f"{name} must be ({x.shape[1]},), one number a channel, not {tuple(tensor.shape)}.")
        if tensor.dtype not in DTYPES or tensor.device != x.device:
            raise ValueError(
                f"{name} must be float32, float16 or bfloat16 on {x.device}, not {tensor.dtype} on {tensor.device}."
            )


def _dense(x: Tensor) -> Tensor:
    """An image whose pixels lie evenly in memory: contiguous or channels last, as it nearly is."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous(memory_format=torch.channels_last if x.stride(1) == 1 else torch.contiguous_format)


@torch.library.custom_op("sana::rms_norm_2d", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, act: str | None, save: bool
) -> tuple[Tensor, Tensor]:
    """Returns the output, and 1 / RMS of every pixel if saved."""
    require_triton(x)
    from sana.ops.rms_norm.forward import launch_rms_norm

    with torch.cuda.device_of(x):
        return launch_rms_norm(_dense(x), _flat(weight), _flat(bias), eps, act, save)


@_forward.register_fake
def _forward_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, act: str | None, save: bool
) -> tuple[Tensor, Tensor]:
    pixels = x.shape[2] * x.shape[3]
    return torch.empty_like(x), x.new_empty((x.shape[0], pixels) if save else (0,), dtype=torch.float32)


@torch.library.custom_op("sana::rms_norm_2d_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor, act: str | None
) -> tuple[Tensor, Tensor]:
    """Returns the gradient of x, and (2, C) those of weight and bias in float32."""
    from sana.ops.rms_norm.backward import launch_rms_norm_grad

    with torch.cuda.device_of(x):
        return launch_rms_norm_grad(_dense(grad), _dense(x), _flat(weight), _flat(bias), scale, act)


@_backward.register_fake
def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor, act: str | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), scale.new_empty((2, x.shape[1]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _, ctx.act, ctx.saved = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, output[1])


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    assert ctx.saved, "the scales were not saved"
    x, weight, bias, scale = ctx.saved_tensors
    grad_x, sums = _backward(grad, x, weight, bias, scale, ctx.act)
    affine = [None if tensor is None else row.to(tensor.dtype) for tensor, row in zip((weight, bias), sums)]
    return grad_x, *affine, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def _flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
