"""Layers of the deep-compression autoencoder: convolutions, RMS norm, residual and EfficientViT blocks, resampling.

Whole encoders and decoders, configs and checkpoints are not here (`dc_ae.py`, `dc_ae_keys.py`, `loading.py`).
Attribute names follow mit-han-lab/efficientvit, because they are the state-dict keys of the released checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NORM_EPS = 1e-5
ATTENTION_EPS = 1e-15


def at_least_fp32(x: Tensor) -> Tensor:
    """16-bit tensors as fp32; wider ones unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Turns autocast off for the device of `x`, where it knows autocast (the meta device does not)."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


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
    """

    def __init__(self, channels: int, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return RMSNormFunction.apply(x, self.weight, self.bias, self.eps)


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
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.act is None else self.act(x)


class OpSequential(nn.Module):
    """`nn.Sequential` whose children live under `op_list` and which drops None entries."""

    def __init__(self, ops: Sequence[nn.Module | None]) -> None:
        super().__init__()
        self.op_list = nn.ModuleList(op for op in ops if op is not None)

    def forward(self, x: Tensor) -> Tensor:
        for op in self.op_list:
            x = op(x)
        return x


class ResidualBlock(nn.Module):
    """`main(x) + shortcut(x)`; a shortcut of None is the identity."""

    def __init__(self, main: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.main = main
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + (x if self.shortcut is None else self.shortcut(x))


class ResBlock(nn.Module):
    """Two 3x3 convolutions with one activation between and the norm last (the main path of a residual block)."""

    def __init__(self, channels: int, *, norm: str | None, act: str | None) -> None:
        super().__init__()
        self.conv1 = ConvLayer(channels, channels, act=act)
        self.conv2 = ConvLayer(channels, channels, bias=False, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class LiteMLA(nn.Module):
    """Multi-scale ReLU linear attention (EfficientViT, section 3.1).

    Every group of 3 * head_dim channels of `qkv` is one head [q, k, v]; each scale adds as many heads again, made by
    a depthwise k x k and a grouped 1x1 convolution of the same q, k, v.

    Args:
        channels: C, divisible by `head_dim`.
        head_dim: channels of one head.
        scales: odd kernel sizes of the extra scales; empty for none.
        norm: norm after the output projection.
    """

    def __init__(self, channels: int, *, head_dim: int, scales: Sequence[int], norm: str | None) -> None:
        super().__init__()
        if channels % head_dim:
            raise ValueError(f"an attention stage of width {channels} is not divisible by the head dim {head_dim}")
        self.head_dim = head_dim
        heads = channels // head_dim
        self.qkv = ConvLayer(channels, 3 * channels, 1, bias=False)
        self.aggreg = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(3 * channels, 3 * channels, k, padding=k // 2, groups=3 * channels, bias=False),
                nn.Conv2d(3 * channels, 3 * channels, 1, groups=3 * heads, bias=False),
            )
            for k in scales
        )
        self.proj = ConvLayer(channels * (1 + len(scales)), channels, 1, bias=False, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        if len(self.aggreg):
            qkv = torch.cat([qkv, *(op(qkv) for op in self.aggreg)], dim=1)
        batch, _, height, width = qkv.shape
        heads = qkv.reshape(batch, -1, 3 * self.head_dim, height * width)  # (B, h, 3d, N)
        query, key, value = heads.split(self.head_dim, dim=2)
        out = relu_attention(F.relu(query), F.relu(key), value)
        return self.proj(out.reshape(batch, -1, height, width))


def relu_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """ReLU attention over non-negative q, k in the cheaper order of multiplication.

    Args:
        query, key, value: (B, h, d, N), q and k already passed through ReLU.

    Returns:
        (B, h, d, N) in the dtype of `value`; computed in fp32 (the sums overflow in fp16).
    """
    dtype = value.dtype
    with without_autocast(value):
        query, key, value = (at_least_fp32(x) for x in (query, key, value))
        if query.shape[-1] > query.shape[-2]:  # more tokens than channels: sum k v over the tokens first
            weights = torch.matmul(value, key.transpose(-1, -2))  # (B, h, d, d)
            total = key.sum(dim=-1, keepdim=True).transpose(-1, -2)  # (B, h, 1, d)
            out = torch.matmul(weights, query) / (torch.matmul(total, query) + ATTENTION_EPS)
        else:
            scores = torch.matmul(key.transpose(-1, -2), query)  # (B, h, N keys, N queries)
            out = torch.matmul(value, scores / (scores.sum(dim=2, keepdim=True) + ATTENTION_EPS))
    return out.to(dtype)


class GLUMBConv(nn.Module):
    """Inverted bottleneck with a gated depthwise convolution: point_conv(a * act(b)), [a, b] = depth_conv(...)."""

    def __init__(self, channels: int, *, norm: str | None, act: str | None, expand_ratio: int = 4) -> None:
        super().__init__()
        hidden = channels * expand_ratio
        self.inverted_conv = ConvLayer(channels, 2 * hidden, 1, act=act)
        self.depth_conv = ConvLayer(2 * hidden, 2 * hidden, 3, groups=2 * hidden)
        self.glu_act = build_act(act) or nn.Identity()
        self.point_conv = ConvLayer(hidden, channels, 1, bias=False, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.depth_conv(self.inverted_conv(x)).chunk(2, dim=1)
        return self.point_conv(value * self.glu_act(gate))


class EfficientViTBlock(nn.Module):
    """Linear attention (context), then a gated convolution (local), each with a residual."""

    def __init__(
        self, channels: int, *, head_dim: int, scales: Sequence[int], norm: str | None, act: str | None
    ) -> None:
        super().__init__()
        self.context_module = ResidualBlock(LiteMLA(channels, head_dim=head_dim, scales=scales, norm=norm))
        self.local_module = ResidualBlock(GLUMBConv(channels, norm=norm, act=act))

    def forward(self, x: Tensor) -> Tensor:
        return self.local_module(self.context_module(x))


class PixelUnshuffleDownsample(nn.Module):
    """3x3 convolution to out_channels / 4, then space to depth by 2."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        if out_channels % 4:
            raise ValueError(f"ConvPixelUnshuffle needs a width divisible by 4, got {out_channels}")
        self.conv = ConvLayer(in_channels, out_channels // 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(self.conv(x), 2)


class PixelShuffleUpsample(nn.Module):
    """3x3 convolution to out_channels * 4, then depth to space by 2."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = ConvLayer(in_channels, out_channels * 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x), 2)


class InterpolateUpsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = ConvLayer(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class ChannelAverage(nn.Module):
    """Shortcut without parameters: space to depth by `factor`, then the mean over equal channel groups."""

    def __init__(self, in_channels: int, out_channels: int, factor: int) -> None:
        super().__init__()
        if in_channels * factor**2 % out_channels:
            raise ValueError(
                f"the averaging shortcut needs {in_channels} * {factor}^2 channels divisible by {out_channels}"
            )
        self.factor = factor
        self.group = in_channels * factor**2 // out_channels

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_unshuffle(x, self.factor) if self.factor > 1 else x
        return x.unflatten(1, (-1, self.group)).mean(dim=2) if self.group > 1 else x


class ChannelDuplicate(nn.Module):
    """Shortcut without parameters: repeat every channel, then depth to space by `factor`."""

    def __init__(self, in_channels: int, out_channels: int, factor: int) -> None:
        super().__init__()
        if out_channels * factor**2 % in_channels:
            raise ValueError(
                f"the duplicating shortcut needs {out_channels} * {factor}^2 channels divisible by {in_channels}"
            )
        self.factor = factor
        self.repeats = out_channels * factor**2 // in_channels

    def forward(self, x: Tensor) -> Tensor:
        x = x.repeat_interleave(self.repeats, dim=1) if self.repeats > 1 else x
        return F.pixel_shuffle(x, self.factor) if self.factor > 1 else x


def attention_scales(block_type: str) -> tuple[int, ...]:
    """Kernel sizes in the name of an EfficientViT block: () of `EViT_GLU`, (5,) of `EViTS5_GLU`.

    Raises:
        ValueError: the name is no such block.
    """
    match = re.fullmatch(r"EViT((?:S\d*[13579])*)_GLU", block_type)
    if match is None:
        raise ValueError(f"unknown block type {block_type!r}: allowed are ResBlock, EViT_GLU and EViTS5_GLU")
    return tuple(int(kernel) for kernel in match[1].split("S")[1:])


def build_block(block_type: str, channels: int, *, head_dim: int, norm: str | None, act: str | None) -> nn.Module:
    """One block of a stage: `ResBlock`, `EViT_GLU` or `EViTS5_GLU` (one extra 5x5 scale).

    Raises:
        ValueError: for another block type.
    """
    if block_type == "ResBlock":
        return ResidualBlock(ResBlock(channels, norm=norm, act=act))
    scales = attention_scales(block_type)
    return EfficientViTBlock(channels, head_dim=head_dim, scales=scales, norm=norm, act=act)


def build_downsample(name: str, in_channels: int, out_channels: int, *, shortcut: bool) -> nn.Module:
    """Halves the size: `Conv` (stride 2) or `ConvPixelUnshuffle`, with the averaging shortcut if asked."""
    layers = {"Conv": lambda i, o: ConvLayer(i, o, stride=2), "ConvPixelUnshuffle": PixelUnshuffleDownsample}
    if name not in layers:
        raise ValueError(f"unknown downsample block {name!r}: allowed are {', '.join(layers)}")
    main = layers[name](in_channels, out_channels)
    return ResidualBlock(main, ChannelAverage(in_channels, out_channels, 2)) if shortcut else main


def build_upsample(name: str, in_channels: int, out_channels: int, *, shortcut: bool) -> nn.Module:
    """Doubles the size: `InterpolateConv` or `ConvPixelShuffle`, with the duplicating shortcut if asked."""
    layers = {"InterpolateConv": InterpolateUpsample, "ConvPixelShuffle": PixelShuffleUpsample}
    if name not in layers:
        raise ValueError(f"unknown upsample block {name!r}: allowed are {', '.join(layers)}")
    main = layers[name](in_channels, out_channels)
    return ResidualBlock(main, ChannelDuplicate(in_channels, out_channels, 2)) if shortcut else main
