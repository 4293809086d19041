"""adaLN in Triton: checks, and the kernels as differentiable operators that torch.compile keeps whole."""

from typing import Any

import torch
from torch import Tensor

from sana.ops.backend import require_triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_WIDTH = 16384  # one token in the registers of one program


def modulated_layer_norm_triton(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift in one kernel: one read of `x`, one write, computed in float32.

    The same function as `modulated_layer_norm_reference`, with deterministic gradients.

    Args:
        x: (B, N, D) float32, float16 or bfloat16.
        shift: (1 or B, 1, D), of these dtypes; may be a slice of a table.
        scale: (1 or B, 1, D).
        eps: added to the variance.

    Returns:
        (B, N, D) contiguous, dtype of `x`.

    Raises:
        TritonUnavailableError: Triton cannot run on `x`.
        ValueError: shapes, dtypes or devices do not fit.
    """
    _check(x, shift=shift, scale=scale)
    rows = [_rows(table, len(x)) for table in (shift, scale)]
    tracked = torch.is_grad_enabled() and (x.requires_grad or shift.requires_grad or scale.requires_grad)
    return _layer_norm(_dense(x), *rows, eps, tracked)[0]


def gated_residual_triton(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate * y in one kernel, computed in float32. The same function as `gated_residual_reference`.

    Args:
        x: (B, N, D) float32, float16 or bfloat16.
        gate: (1 or B, 1, D), of these dtypes; may be a slice of a table.
        y: (B, N, D), dtype of its own.

    Returns:
        (B, N, D) contiguous, dtype of `x`.

    Raises:
        TritonUnavailableError: Triton cannot run on `x`.
        ValueError: shapes, dtypes or devices do not fit.
    """
    _check(x, gate=gate)
    if y.shape != x.shape or y.dtype not in DTYPES or y.device != x.device:
        raise ValueError(
            f"y must be like x, {tuple(x.shape)} on {x.device} in a floating dtype up to float32, not "
            f"{tuple(y.shape)} on {y.device} in {y.dtype}."
        )
    return _gated(_dense(x), _rows(gate, len(x)), _dense(y))


def _check(x: Tensor, **tables: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be float32, float16 or bfloat16, not {x.dtype}; use backend='reference' for others.")
    if x.dim() != 3 or 0 in x.shape or x.shape[2] > MAX_WIDTH:
        raise ValueError(f"x must be (B, N, D), not empty, with D at most {MAX_WIDTH}, not {tuple(x.shape)}.")
    for name, table in tables.items():
        if table.dim() != 3 or tuple(table.shape[1:]) != (1, x.shape[2]) or table.shape[0] not in (1, len(x)):
            raise ValueError(
                f"{name} must be (1, 1, {x.shape[2]}) or ({len(x)}, 1, {x.shape[2]}), not {tuple(table.shape)}."
            )
        if table.dtype not in DTYPES or table.device != x.device:
            raise ValueError(
                f"{name} must be float32, float16 or bfloat16 on {x.device}, not {table.dtype} on {table.device}."
            )


def _rows(table: Tensor, images: int) -> Tensor:
    """(1 or B, 1, D) -> (B, 1, D) without a copy; autograd adds the gradients of a shared row."""
    return _dense(table).expand(images, 1, -1)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("sana::modulated_layer_norm", mutates_args=())
def _layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float, save: bool) -> tuple[Tensor, Tensor]:
    """Returns the output, and the moments of every token if saved."""
    require_triton(x)
    from sana.ops.modulation.forward import launch_layer_norm

    with torch.cuda.device_of(x):
        return launch_layer_norm(x, shift, scale, eps, save)


@_layer_norm.register_fake
def _layer_norm_fake(x: Tensor, shift: Tensor, scale: Tensor, eps: float, save: bool) -> tuple[Tensor, Tensor]:
    images, tokens, width = x.shape
    moments = x.new_empty((images, tokens, 2) if save else (0,), dtype=torch.float32)
    return x.new_empty((images, tokens, width)), moments


@torch.library.custom_op("sana::modulated_layer_norm_backward", mutates_args=())
def _layer_norm_backward(grad: Tensor, x: Tensor, scale: Tensor, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from sana.ops.modulation.backward import launch_layer_norm_grad

    with torch.cuda.device_of(x):
        return launch_layer_norm_grad(_dense(grad), x, scale, moments)


@_layer_norm_backward.register_fake
def _layer_norm_backward_fake(grad: Tensor, x: Tensor, scale: Tensor, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    images, tokens, width = x.shape
    row = moments.new_empty((images, 1, width))
    return x.new_empty((images, tokens, width)), row, torch.empty_like(row)


def _keep_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, shift, scale, _, ctx.saved = inputs
    ctx.shift_dtype = shift.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, scale, output[1])


def _differentiate_layer_norm(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    assert ctx.saved, "the moments were not saved"
    x, scale, moments = ctx.saved_tensors
    grad_x, grad_shift, grad_scale = _layer_norm_backward(grad, x, scale, moments)
    return grad_x, grad_shift.to(ctx.shift_dtype), grad_scale.to(scale.dtype), None, None


_layer_norm.register_autograd(_differentiate_layer_norm, setup_context=_keep_layer_norm)


@torch.library.custom_op("sana::gated_residual", mutates_args=())
def _gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    require_triton(x)
    from sana.ops.modulation.forward import launch_gated_residual

    with torch.cuda.device_of(x):
        return launch_gated_residual(x, gate, y)


@_gated.register_fake
def _gated_fake(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("sana::gated_residual_backward", mutates_args=())
def _gated_backward(grad: Tensor, gate: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    from sana.ops.modulation.backward import launch_gated_residual_grad

    with torch.cuda.device_of(y):
        return launch_gated_residual_grad(_dense(grad), gate, y)


@_gated_backward.register_fake
def _gated_backward_fake(grad: Tensor, gate: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    images, _, width = y.shape
    return gate.new_empty((images, 1, width), dtype=torch.float32), y.new_empty(y.shape)


def _keep_gated(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    _, gate, y = inputs
    ctx.save_for_backward(gate, y)


def _differentiate_gated(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate, y = ctx.saved_tensors
    grad_gate, grad_y = _gated_backward(grad, gate, y)
    return grad, grad_gate.to(gate.dtype), grad_y


_gated.register_autograd(_differentiate_gated, setup_context=_keep_gated)
