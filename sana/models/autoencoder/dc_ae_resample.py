"""Changes of resolution in the deep-compression autoencoder, and their shortcuts without parameters.

Layers are in `dc_ae_layers.py`. Attribute names are state-dict keys of released checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.models.autoencoder.dc_ae_layers import ConvLayer, ResidualBlock, is_plain
from sana.ops.backend import choose
from sana.ops.convolution.cpu import conv2d_cpu


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
    """Nearest-neighbour doubling, then a 3x3 convolution.

    Both are together four 2x2 convolutions of the small image, one for each position in a 2x2 cell of the large one,
    whose kernels are sums of taps of the 3x3 kernel. Inference on a CPU computes that in float32: 16 products instead
    of 36, and no image in between.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = ConvLayer(in_channels, out_channels)
        self._folded: tuple[object, list[Tensor], tuple[Tensor, Tensor | None]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.folds(x):
            return self.folded(x)
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))

    def folds(self, x: Tensor) -> bool:
        """Whether the folded form computes `x`: float32 inference on a CPU."""
        return is_plain(self.conv.conv) and x.dtype == torch.float32 and choose("auto", x) == "cpu"

    def folded(self, x: Tensor, repeats: int = 0) -> Tensor:
        """The four convolutions of `subpixel_kernels`, interleaved.

        The border is a copy's: with padding of its own oneDNN rounds 2x2 convolutions of some sizes in another order.
        """
        return interleave(conv2d_cpu(F.pad(x, (1, 1, 1, 1)), *self._kernels(repeats)))

    def _kernels(self, repeats: int) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the four convolutions; kept for weights that are not trained, while they stay the same."""
        sources = [tensor for tensor in (self.conv.conv.weight, self.conv.conv.bias) if tensor is not None]
        plain = all(type(tensor) in (Tensor, nn.Parameter) for tensor in sources)  # fake ones have no address
        fixed = plain and not any(tensor.requires_grad or tensor.is_inference() for tensor in sources)
        state = (repeats, [(id(tensor), tensor.data_ptr(), tensor._version) for tensor in sources]) if fixed else None
        if self._folded is not None and fixed and self._folded[0] == state:
            return self._folded[2]
        weight, bias = self.conv.conv.weight.detach(), self.conv.conv.bias
        kernels = (subpixel_kernels(weight, repeats), None if bias is None else bias.detach().repeat(4))
        self._folded = (state, sources, kernels) if fixed else None  # `sources` keeps the ids from being given anew
        return kernels

    def _apply(self, *args: Any, **kwargs: Any) -> InterpolateUpsample:
        self._folded = None  # the weights are cast or moved
        return super()._apply(*args, **kwargs)


class UpsampleBlock(ResidualBlock):
    """A convolution that doubles the size, plus the duplicating shortcut."""

    def __init__(self, main: nn.Module, shortcut: ChannelDuplicate) -> None:
        super().__init__(main, shortcut)
        self.repeats = shortcut.repeats

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.main, InterpolateUpsample) and self.main.folds(x):
            return self.main.folded(x, self.repeats)
        return super().forward(x)


def subpixel_kernels(weight: Tensor, repeats: int) -> Tensor:
    """Kernels on the small image equal to a 3x3 convolution of its nearest-neighbour doubling.

    The 2x2 window at (i, j) covers pixels i - 1 to i and j - 1 to j. Position (a, b) of the 2x2 cell at (i, j) is the
    window at (i + a, j + b).

    Args:
        weight: (out, in, 3, 3).
        repeats: of the duplicating shortcut to add, whose output channel c at (a, b) is input channel
            (4 * c + 2 * a + b) // repeats; 0 for no shortcut.

    Returns:
        (4 * out, in, 2, 2), channels last in memory; channel (2 * a + b) * out + c is output c at (a, b).
    """
    out_channels, in_channels = weight.shape[:2]
    taps = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # position, tap, tap of the 3x3
    kernels = torch.einsum("aiu,bjv,ocuv->abocij", taps, taps, weight)
    if repeats:
        channel = torch.arange(out_channels, device=weight.device)
        for a in (0, 1):
            for b in (0, 1):
                kernels[a, b, channel, (4 * channel + 2 * a + b) // repeats, 1 - a, 1 - b] += 1
    return kernels.reshape(4 * out_channels, in_channels, 2, 2).contiguous(memory_format=torch.channels_last)


def interleave(windows: Tensor) -> Tensor:
    """(B, 4 * C, H + 1, W + 1) of the kernels above -> (B, C, 2 * H, 2 * W), channels last in memory."""
    batch, channels, height, width = windows.shape[0], windows.shape[1] // 4, windows.shape[2] - 1, windows.shape[3] - 1
    cells = windows.new_empty(batch, height, 2, width, 2, channels)
    for a in (0, 1):
        for b in (0, 1):
            window = windows[:, (2 * a + b) * channels :, a : a + height, b : b + width][:, :channels]
            cells[:, :, a, :, b] = window.permute(0, 2, 3, 1)
    return cells.view(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


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
    return UpsampleBlock(main, ChannelDuplicate(in_channels, out_channels, 2)) if shortcut else main
