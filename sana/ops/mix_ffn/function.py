"""The Mix-FFN by Triton kernels as differentiable functions: input checks, saved tensors, autograd. No kernel is here.

Forward and backward are registered with PyTorch (`torch.ops.sana.mix_ffn_forward`, `_backward`), so that torch.compile
keeps them whole and breaks no graph.

For the backward pass x and the expansion z (B, N, 2M) are kept, or with `recompute` x alone: selective checkpointing of
one GEMM of 4 B N D M FLOPs for the largest activation of a block. At D = 1152, M = 2880 in 16 bits z is 11,520 bytes a
token and block, x 2,304. Everything else the backward pass makes again: the activated expansion and both convolutions.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sana.ops.backend import interpreting, require_triton
from sana.ops.mix_ffn import plan
from sana.ops.mix_ffn.reference import WeightBias

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("x", "inverted weight", "inverted bias", "depth weight", "depth bias", "point weight", "point bias")


def mix_ffn_triton(
    x: Tensor,
    grid: tuple[int, int],
    inverted: WeightBias,
    depth: WeightBias,
    point: WeightBias,
    *,
    recompute: bool = False,
) -> Tensor:
    """Mix-FFN with SiLU after the expansion and on the gate, 3x3, dilation 1 (Sana, section 2.2; official `GLUMBConv`).

    Sums run in float32; intermediate tensors are rounded to the dtype of x. Forward and backward give the same bits in
    every run. The kernels give one image the same bits in every batch; the library's GEMMs (projection, gradients, the
    expansion where `plan.expansion_plan` says so) do if the library picks the same kernel. Under autocast all tensors
    are cast to its dtype, as those of convolutions are.

    Args:
        x: (B, N, D) tokens in row-major order of the grid; float32, float16 or bfloat16.
        grid: (H, W) with H * W = N.
        inverted: weight (2M, D, 1, 1) and bias (2M,) or None of the expansion.
        depth: weight (2M, 1, 3, 3) and bias (2M,) or None of the depthwise convolution.
        point: weight (D', M, 1, 1) and bias (D',) or None of the projection.
        recompute: for training: keep x alone and compute the expansion again in the backward pass; same bits.

    Returns:
        (B, N, D') in the dtype of x.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        TritonUnavailableError: Triton cannot run on x.
    """
    return _run(x, grid, (*inverted, *depth, *point), pre_glu=False, recompute=recompute)


def pre_glu_conv_triton(
    x: Tensor,
    grid: tuple[int, int],
    inverted: WeightBias,
    depth: WeightBias,
    point: WeightBias,
    *,
    recompute: bool = False,
) -> Tensor:
    """As `mix_ffn_triton`, with the gate BEFORE the depthwise convolution and SiLU after it (official `MBConvPreGLU`).

    Args:
        x: (B, N, D) tokens in row-major order of the grid; float32, float16 or bfloat16.
        grid: (H, W) with H * W = N.
        inverted: weight (2M, D, 1, 1) and bias (2M,) or None of the expansion.
        depth: weight (M, 1, 3, 3) and bias (M,) or None of the depthwise convolution.
        point: weight (D', M, 1, 1) and bias (D',) or None of the projection.
        recompute: for training: keep x alone and compute the expansion again in the backward pass; same bits.

    Returns:
        (B, N, D') in the dtype of x.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        TritonUnavailableError: Triton cannot run on x.
    """
    return _run(x, grid, (*inverted, *depth, *point), pre_glu=True, recompute=recompute)


def _run(
    x: Tensor, grid: tuple[int, int], weights: tuple[Tensor | None, ...], *, pre_glu: bool, recompute: bool
) -> Tensor:
    tensors = [x, *weights]
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
    _check(tensors, grid, pre_glu)
    needed = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    out, _ = mix_ffn_forward(*tensors, *grid, pre_glu, needed and not recompute)
    return out


def _check(tensors: Sequence[Tensor | None], grid: tuple[int, int], pre_glu: bool) -> None:
    x, inverted, _, _, _, point, _ = tensors
    if x is None or inverted is None or point is None or x.ndim != 3 or inverted.ndim != 4 or point.ndim != 4:
        raise ValueError("mix_ffn takes x (B, N, D) and the weights of three convolutions (out, in, height, width).")
    if grid[0] < 1 or grid[0] * grid[1] != x.shape[1]:
        raise ValueError(f"mix_ffn got {x.shape[1]} tokens on a grid of {grid[0]} x {grid[1]}: H * W must equal N.")
    wide, dim, out_dim = inverted.shape[0], x.shape[2], point.shape[0]
    hidden = wide // 2
    channels = hidden if pre_glu else wide
    expected = (
        tuple(x.shape),
        (2 * hidden, dim, 1, 1),
        (wide,),
        (channels, 1, 3, 3),
        (channels,),
        (out_dim, hidden, 1, 1),
        (out_dim,),
    )
    for name, tensor, shape in zip(NAMES, tensors, expected, strict=True):
        if tensor is None:
            if "bias" in name:
                continue
            raise ValueError(f"mix_ffn's {name} is None; only biases may be.")
        if tuple(tensor.shape) != shape:
            kind = "the gate before the convolution" if pre_glu else "two halves convolved"
            raise ValueError(f"mix_ffn's {name} has shape {tuple(tensor.shape)}, expected {shape} ({kind}).")
        if tensor.dtype != x.dtype or tensor.dtype not in DTYPES:
            raise ValueError(
                f"mix_ffn's {name} is {tensor.dtype} and x is {x.dtype}: all must be one of float32, float16 and "
                "bfloat16. Cast the module, or use autocast."
            )
        if tensor.device != x.device:
            raise ValueError(f"mix_ffn's {name} is on {tensor.device} and x on {x.device}: move them to one device.")


def _capability(x: Tensor) -> plan.Capability | None:
    return None if interpreting() or x.device.type != "cuda" else torch.cuda.get_device_capability(x.device)


def _flat(x: Tensor) -> Tensor:
    """(B, N, D) -> (B * N, D) with channels contiguous, without a copy where strides allow it."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def _taps(depth: Tensor) -> Tensor:
    """(C, 1, 3, 3) -> (9, C): neighbouring threads then read neighbouring channels."""
    return depth.reshape(-1, 9).t().contiguous()


def _expand(x: Tensor, inverted: Tensor, bias: Tensor | None, pre_glu: bool, keep: bool) -> tuple[Tensor, Tensor]:
    """Returns the activated expansion, and the expansion before the activation (empty unless asked for)."""
    from sana.ops.mix_ffn.forward import expand

    weight = inverted.reshape(inverted.shape[0], -1).contiguous()
    chosen = plan.expansion_plan(x.shape[1], weight.shape[0], weight.shape[1], x.dtype, _capability(x))
    active, pre = expand(_flat(x), weight, bias, glu=pre_glu, keep=keep, plan=chosen)
    return active, x.new_empty(0) if pre is None else pre


@torch.library.custom_op("sana::mix_ffn_forward", mutates_args=())
def mix_ffn_forward(
    x: Tensor,
    inverted: Tensor,
    inverted_bias: Tensor | None,
    depth: Tensor,
    depth_bias: Tensor | None,
    point: Tensor,
    point_bias: Tensor | None,
    height: int,
    width: int,
    pre_glu: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the output (B, N, D') and the expansion (B * N, 2M), or an empty tensor unless `keep`. Unchecked."""
    require_triton(x)
    from sana.ops.mix_ffn.forward import depthwise

    active, pre = _expand(x, inverted, inverted_bias, pre_glu, keep)
    tile = plan.forward_tile(height, _capability(x))
    gated = depthwise(active, (height, width), _taps(depth), depth_bias, gated=not pre_glu, tile=tile)
    out = F.linear(gated, point.reshape(point.shape[0], -1), point_bias)
    return out.view(x.shape[0], x.shape[1], point.shape[0]), pre


@mix_ffn_forward.register_fake
def _fake_forward(x: Tensor, inverted: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    _, _, _, point, _, _, _, _, keep = others
    pre = x.new_empty(x.shape[0] * x.shape[1], inverted.shape[0]) if keep else x.new_empty(0)
    return x.new_empty(x.shape[0], x.shape[1], point.shape[0]), pre


@torch.library.custom_op("sana::mix_ffn_backward", mutates_args=())
def mix_ffn_backward(
    d_out: Tensor,
    pre: Tensor,
    x: Tensor,
    inverted: Tensor,
    inverted_bias: Tensor | None,
    depth: Tensor,
    depth_bias: Tensor | None,
    point: Tensor,
    height: int,
    width: int,
    pre_glu: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Returns the gradients of x and of the six weights and biases, those not needed empty. Unchecked.

    Args:
        d_out: (B, N, D').
        pre: the expansion that the forward pass kept, or an empty tensor to compute it again.
        x, inverted, inverted_bias, depth, depth_bias, point, height, width, pre_glu: as for the forward pass.
        needs: one flag a gradient.
    """
    from sana.ops.mix_ffn.backward import gate_backward, input_backward
    from sana.ops.mix_ffn.forward import activate

    gradients = [x.new_empty(0) for _ in NAMES]
    grid, capability, taps, flat = (height, width), _capability(x), _taps(depth), _flat(d_out)
    if needs[6]:
        gradients[6] = flat.sum(0, dtype=torch.float32).to(x.dtype)
    if not any(needs[:6]):
        return gradients
    if pre.numel() == 0:
        active, pre = _expand(x, inverted, inverted_bias, pre_glu, keep=True)
    else:
        active = activate(pre, pre_glu)
    d_gated = flat @ point.reshape(point.shape[0], -1)
    tile = plan.weight_gradient_tile(height, capability)
    gated, d_conv, sums = gate_backward(active, grid, taps, depth_bias, d_gated, gated=not pre_glu, tile=tile)
    del active, d_gated
    if needs[5]:
        gradients[5] = (flat.t() @ gated).view(point.shape)
    if needs[3]:
        gradients[3] = sums[:9].t().to(x.dtype).contiguous().view(depth.shape)
    if needs[4]:
        gradients[4] = sums[9].to(x.dtype, copy=True)
    del gated
    if not any(needs[:3]):
        return gradients
    tile = plan.input_gradient_tile(height, capability)
    d_pre, sums = input_backward(d_conv, grid, taps, pre, pre_glu=pre_glu, tile=tile)
    if needs[0]:
        gradients[0] = (d_pre @ inverted.reshape(inverted.shape[0], -1)).view(x.shape)
    if needs[1]:
        gradients[1] = (d_pre.t() @ _flat(x)).view(inverted.shape)
    if needs[2]:
        gradients[2] = sums.to(x.dtype)
    return gradients


@mix_ffn_backward.register_fake
def _fake_backward(d_out: Tensor, pre: Tensor, x: Tensor, inverted: Tensor, *others: Any) -> list[Tensor]:
    _, depth, _, point, _, _, _, needs = others
    wide, channels, out_dim = inverted.shape[0], depth.shape[0], point.shape[0]
    shapes = (x.shape, inverted.shape, (wide,), depth.shape, (channels,), point.shape, (out_dim,))
    return [x.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.height, ctx.width, ctx.pre_glu, _ = inputs
    ctx.save_for_backward(output[1], *tensors[:6])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:7])
    if d_out is None or not any(needs):
        return (None,) * 11
    pre, *tensors = ctx.saved_tensors
    gradients = mix_ffn_backward(d_out, pre, *tensors, ctx.height, ctx.width, ctx.pre_glu, needs)
    return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), *(None,) * 4


mix_ffn_forward.register_autograd(_backward, setup_context=_save)
