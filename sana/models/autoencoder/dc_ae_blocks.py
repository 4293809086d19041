"""Blocks of the deep-compression autoencoder: residual convolutions, and EfficientViT's attention and Mix-FFN.

Layers are in `dc_ae_layers.py`, changes of resolution in `dc_ae_resample.py`, whole networks in `dc_ae.py`.
Attribute names follow mit-han-lab/efficientvit, because they are the state-dict keys of the released checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.models.autoencoder.dc_ae_layers import (
    ConvLayer,
    ResidualBlock,
    RMSNorm2d,
    at_least_fp32,
    build_act,
    is_plain,
    without_autocast,
)
from sana.ops import mix_ffn
from sana.ops.backend import choose
from sana.ops.chunks import every
from sana.ops.mix_ffn.reference import to_image

ATTENTION_EPS = 1e-15
TOKENS_AT_ONCE = 1024  # that `exact_sums` widens: they stay in the cache


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
        batch, _, height, width = qkv.shape
        if self._attends_on_cpu(x):
            return self.proj(self._attend_on_cpu(qkv))
        if len(self.aggreg):
            qkv = torch.cat([qkv, *(op(qkv) for op in self.aggreg)], dim=1)
        heads = qkv.reshape(batch, -1, 3 * self.head_dim, height * width)  # (B, h, 3d, N)
        query, key, value = heads.split(self.head_dim, dim=2)
        out = relu_attention(F.relu(query), F.relu(key), value)
        return self.proj(out.reshape(batch, -1, height, width))

    def _attends_on_cpu(self, x: Tensor) -> bool:
        """Whether `x` is one float32 image of more tokens than channels in a head, in inference on a CPU."""
        if x.shape[0] > 1 or x.shape[2] * x.shape[3] <= self.head_dim or x.dtype != torch.float32:
            return False
        return choose("auto", x) == "cpu" and all(is_plain(conv) for scale in self.aggreg for conv in scale.children())

    def _attend_on_cpu(self, qkv: Tensor) -> Tensor:
        """The same with channels last in memory: heads are cut and joined by strides, and nothing is transposed."""
        _, channels, height, width = qkv.shape
        tokens, parts, size = height * width, channels // self.head_dim, self.head_dim

        def split(x: Tensor) -> Tensor:  # (1, 3C, H, W) -> (3h, N, d)
            return x.permute(0, 2, 3, 1).reshape(tokens, parts, size).transpose(0, 1)

        scales = [split(qkv)]
        for scale in self.aggreg:
            depthwise, grouped = scale.children()
            weight = grouped.weight.view(parts, size, size).transpose(1, 2)
            scales.append(torch.bmm(split(depthwise(qkv)), weight))
        out = qkv.new_empty(tokens, len(scales), parts // 3, size)
        for i, heads in enumerate(scales):
            query, key, value = heads.unflatten(0, (-1, 3)).unbind(1)  # (h, N, d)
            query, (key_value, total) = query.relu(), (x.to(qkv.dtype) for x in exact_sums(key, value))
            divisor = torch.bmm(query, total).add_(ATTENTION_EPS)
            torch.div(torch.bmm(query, key_value), divisor, out=out[:, i].transpose(0, 1))
        return out.view(1, height, width, -1).permute(0, 3, 1, 2)


def exact_sums(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over tokens of ReLU(key) times value, and of ReLU(key), in float64, which costs little on a CPU.

    Rounded to float32 they do not depend on the order of the tokens, so that an image attends alike in tiles and whole.

    Args:
        key, value: (..., N, d).

    Returns:
        (..., d, d) and (..., d, 1).
    """
    *heads, tokens, size = key.shape
    key_value = key.new_zeros(*heads, size, size, dtype=torch.float64)
    total = key.new_zeros(*heads, size, 1, dtype=torch.float64)
    for start in every(range(0, tokens, TOKENS_AT_ONCE)):
        some = key[..., start : start + TOKENS_AT_ONCE, :].relu().double()
        key_value += torch.matmul(some.transpose(-1, -2), value[..., start : start + TOKENS_AT_ONCE, :].double())
        total += some.sum(dim=-2).unsqueeze(-1)
    return key_value, total


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
    """Inverted bottleneck with a gated depthwise convolution: point_conv(a * act(b)), [a, b] = depth_conv(...).

    Attributes:
        backend: see `sana.ops.backend`; with SiLU it is the operator `mix_ffn`.
    """

    def __init__(self, channels: int, *, norm: str | None, act: str | None, expand_ratio: int = 4) -> None:
        super().__init__()
        hidden = channels * expand_ratio
        self.backend = "auto"
        self.inverted_conv = ConvLayer(channels, 2 * hidden, 1, act=act)
        self.depth_conv = ConvLayer(2 * hidden, 2 * hidden, 3, groups=2 * hidden)
        self.glu_act = build_act(act) or nn.Identity()
        self.point_conv = ConvLayer(hidden, channels, 1, bias=False, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        convolutions = (self.inverted_conv.conv, self.depth_conv.conv, self.point_conv.conv)
        fused = type(self.glu_act) is nn.SiLU and all(is_plain(conv) for conv in convolutions)
        if not fused or choose(self.backend, x) == "reference":
            value, gate = self.depth_conv(self.inverted_conv(x)).chunk(2, dim=1)
            return self.point_conv(value * self.glu_act(gate))
        height, width = x.shape[2:]
        weights = [(conv.weight, conv.bias) for conv in convolutions]
        tokens = mix_ffn(x.flatten(2).transpose(1, 2), (height, width), *weights, backend=self.backend)
        out = to_image(tokens, (height, width))
        norm = self.point_conv.norm
        return norm(out, inplace=True) if isinstance(norm, RMSNorm2d) else out if norm is None else norm(out)


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
