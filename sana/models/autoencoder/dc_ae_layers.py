"""Layers that every part of the deep-compression autoencoder shares: convolution, RMS norm, activation, residual.

Blocks are in `dc_ae_blocks.py`, changes of resolution in `dc_ae_resample.py`.
Attribute names follow mit-han-lab/efficientvit, because they are the state-dict keys of the released checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sana.ops.backend import choose
from sana.ops.convolution.cpu import conv2d_cpu
from sana.ops.linear.cpu import linear_cpu
from sana.ops.rms_norm import reference
from sana.ops.rms_norm.cpu import rms_norm_2d_cpu
from sana.ops.rms_norm.function import rms_norm_2d_triton

NORM_EPS = 1e-5
FUSED_ACTS: dict[type, str] = {nn.ReLU: "relu", nn.SiLU: "silu"}  # what a norm can apply in the same pass


def at_least_fp32(x: Tensor) -> Tensor:
    """16-bit tensors as fp32; wider ones unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Turns autocast off for the device of `x`; the meta device knows none."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


class RMSNormFunction(torch.autograd.Function):
    """y = w * x / sqrt(mean_c(x^2) + eps) + b with the gradients written out.

    Sums over channels are matrix products, which avoids slow strided reductions on a CPU: about 2.5 times faster in
    training than autograd through the formula, without permuting to channels-last.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        with without_autocast(x):
            wide = at_least_fp32(x)  # squares overflow in fp16
            mean = wide.new_full((1, x.shape[1]), 1 / x.shape[1])
            mean_square = torch.matmul(mean, wide.square().flatten(2))  # (B, 1, H * W)
            scale = torch.rsqrt(mean_square + eps).view(x.shape[0], 1, *x.shape[2:])
            y = torch.addcmul(bias.to(wide.dtype).view(-1, 1, 1), wide * scale, weight.to(wide.dtype).view(-1, 1, 1))
        ctx.save_for_backward(x, weight, scale)
        return y.to(torch.promote_types(x.dtype, weight.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last  # mixed layouts are slow
        with without_autocast(x):
            grad = at_least_fp32(grad).contiguous(memory_format=layout)
            normed, wide = x * scale, at_least_fp32(weight)
            product = grad * normed
            grad_weight, grad_bias = product.sum((0, 2, 3)), grad.sum((0, 2, 3))
            mean = torch.matmul(wide.view(1, -1) / x.shape[1], product.flatten(2)).view_as(scale)
            grad_x = torch.addcmul(grad * wide.view(-1, 1, 1), normed, mean, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None


class RMSNorm2d(nn.Module):
    """RMS norm over the channels of a (B, C, H, W) map, with weight and bias (efficientvit `rms2d`/`trms2d`).

    Args:
        channels: C.
        eps: added to the mean square, in fp32.

    Attributes:
        backend: see `sana.ops.backend`; "triton" fuses the norm and the activation that follows it.
    """

    def __init__(self, channels: int, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.eps = eps
        self.backend = "auto"
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, act: str | None = None, *, inplace: bool = False) -> Tensor:
        """Normalises, then applies `act`: None, "silu" or "relu". `inplace` allows inference to overwrite `x`."""
        backend, affine = choose(self.backend, x), (self.weight, self.bias)
        if backend == "cpu":
            return rms_norm_2d_cpu(x, *affine, self.eps, act, inplace=inplace)
        if backend == "triton":
            out = rms_norm_2d_triton(x, *affine, self.eps, act)
        elif torch.compiler.is_compiling():  # a compiler fuses the formula and its gradients by itself
            out = reference.rms_norm_2d(x, *affine, self.eps, act)
        else:
            out = reference.activate(RMSNormFunction.apply(x, *affine, self.eps), act)
        return out.to(torch.promote_types(x.dtype, self.weight.dtype))


def build_norm(name: str | None, channels: int) -> nn.Module | None:
    """`trms2d`/`rms2d` (RMS norm over channels), `bn2d` (batch norm) or None.

    Raises:
        ValueError: for another name.
    """
    if name is None:
        return None
    if name in ("trms2d", "rms2d"):
        return RMSNorm2d(channels)
    if name == "bn2d":
        return nn.BatchNorm2d(channels, eps=NORM_EPS)
    raise ValueError(f"unknown norm {name!r}: allowed are 'trms2d', 'rms2d', 'bn2d' and None")


def build_act(name: str | None) -> nn.Module | None:
    """`relu`, `silu`, `gelu` or None.

    Raises:
        ValueError: for another name.
    """
    if name is None:
        return None
    activations = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}
    if name not in activations:
        raise ValueError(f"unknown activation {name!r}: allowed are {', '.join(activations)} and None")
    return activations[name]()


class ConvLayer(nn.Module):
    """Same-size (or strided) convolution, then an optional norm, then an optional activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = True,
        norm: str | None = None,
        act: str | None = None,
    ) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=bias)
        self.norm = build_norm(norm, out_channels)
        self.act = build_act(act)

    def forward(self, x: Tensor) -> Tensor:
        x = self._convolve(x)
        if isinstance(self.norm, RMSNorm2d):
            name = FUSED_ACTS.get(type(self.act))
            x = self.norm(x, name, inplace=True)
            return x if self.act is None or name else self.act(x)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.act is None else apply_act(self.act, x)

    def _convolve(self, x: Tensor) -> Tensor:
        """The convolution alone; a plain 1x1 is a matrix product, which CPU inference does faster by that name."""
        conv = self.conv
        if not is_plain(conv) or conv.groups > 1 or choose("auto", x) != "cpu":
            return conv(x)
        if conv.kernel_size == (1, 1) and conv.stride == (1, 1):
            return linear_cpu(x.permute(0, 2, 3, 1), conv.weight, conv.bias).permute(0, 3, 1, 2)
        return conv2d_cpu(x, conv.weight, conv.bias, stride=conv.stride[0], padding=int(conv.padding[0]))


def is_plain(conv: nn.Module) -> bool:
    """Whether a convolution is PyTorch's own, neither quantised nor wrapped, so that its weight says all."""
    return type(conv) is nn.Conv2d


def apply_act(act: nn.Module, x: Tensor) -> Tensor:
    """Applies an activation to a tensor that nobody else holds: in place where no gradient is wanted."""
    name = FUSED_ACTS.get(type(act))
    if torch.is_grad_enabled() or name is None:
        return act(x)
    return x.relu_() if name == "relu" else F.silu(x, inplace=True)


class OpSequential(nn.Module):
    """`nn.Sequential` whose children live under `op_list` and which drops None entries."""

    def __init__(self, ops: Sequence[nn.Module | None]) -> None:
        super().__init__()
        self.op_list = nn.ModuleList(op for op in ops if op is not None)

    def forward(self, x: Tensor) -> Tensor:
        fused: nn.Module | None = None
        for op, following in zip_longest(self.op_list, list(self.op_list)[1:]):
            if op is fused:
                continue
            if isinstance(op, RMSNorm2d) and type(following) in FUSED_ACTS:
                fused, x = following, op(x, FUSED_ACTS[type(following)])
            else:
                x = op(x)
        return x


class ResidualBlock(nn.Module):
    """`main(x) + shortcut(x)`; a shortcut of None is the identity."""

    def __init__(self, main: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.main = main
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out, shortcut = self.main(x), x if self.shortcut is None else self.shortcut(x)
        if torch.is_grad_enabled() or out.dtype != shortcut.dtype:
            return out + shortcut
        return out.add_(shortcut)  # `out` is a tensor of its own: every main path ends in a convolution or a norm
