"""Which pixels of its input a module of the DC-AE reads, derived from its kernels, strides and changes of resolution.

Nothing is computed here. All is one-dimensional: every layer treats height and width alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import singledispatch

from torch import nn

from sana.models.autoencoder.dc_ae_blocks import EfficientViTBlock, GLUMBConv, LiteMLA, ResBlock
from sana.models.autoencoder.dc_ae_layers import ConvLayer, OpSequential, ResidualBlock, RMSNorm2d
from sana.models.autoencoder.dc_ae_resample import (
    ChannelAverage,
    ChannelDuplicate,
    InterpolateUpsample,
    PixelShuffleUpsample,
    PixelUnshuffleDownsample,
)


@dataclass(frozen=True)
class Resize:
    """Doubling, pixel shuffle and its inverse, or nothing at all (both factors 1): output pixels = input * up / down.

    Attributes:
        up, down: the factors.
    """

    up: int = 1
    down: int = 1

    def needed(self, start: int, stop: int) -> tuple[int, int]:
        """The input pixels [first, last) that the output pixels [start, stop) are made of; may lie outside the map."""
        return start * self.down // self.up, -(-stop * self.down // self.up)

    def widest(self) -> Fraction:
        """Numbers of the largest map that a convolution inside writes, for each pixel of the input."""
        return Fraction(0)


@dataclass(frozen=True)
class Window:
    """A convolution.

    Attributes:
        kernel, down, padding, dilation: its kernel size, stride, padding and dilation.
        channels: that it writes.
    """

    kernel: int
    down: int
    padding: int
    dilation: int
    channels: int
    up: int = 1

    def needed(self, start: int, stop: int) -> tuple[int, int]:
        """As `Resize.needed`."""
        first = start * self.down - self.padding
        return first, (stop - 1) * self.down - self.padding + (self.kernel - 1) * self.dilation + 1

    def widest(self) -> Fraction:
        """As `Resize.widest`."""
        return Fraction(self.channels, self.down**2)


@dataclass(frozen=True)
class Chain:
    """One after the other."""

    steps: tuple[Reach, ...]

    @property
    def up(self) -> int:
        """As `Resize.up`; not reduced by `down`."""
        return _product(step.up for step in self.steps)

    @property
    def down(self) -> int:
        """As `Resize.down`."""
        return _product(step.down for step in self.steps)

    def needed(self, start: int, stop: int) -> tuple[int, int]:
        """As `Resize.needed`."""
        for step in reversed(self.steps):
            start, stop = step.needed(start, stop)
        return start, stop

    def widest(self) -> Fraction:
        """As `Resize.widest`."""
        most, area = Fraction(0), Fraction(1)
        for step in self.steps:
            most = max(most, area * step.widest())
            area *= Fraction(step.up, step.down) ** 2
        return most


@dataclass(frozen=True)
class Parallel:
    """Paths from the same input to one output, of the same change of resolution."""

    paths: tuple[Reach, ...]

    @property
    def up(self) -> int:
        """As `Resize.up`."""
        return self.paths[0].up

    @property
    def down(self) -> int:
        """As `Resize.down`."""
        return self.paths[0].down

    def needed(self, start: int, stop: int) -> tuple[int, int]:
        """As `Resize.needed`."""
        spans = [path.needed(start, stop) for path in self.paths]
        return min(first for first, _ in spans), max(last for _, last in spans)

    def widest(self) -> Fraction:
        """As `Resize.widest`."""
        return max(path.widest() for path in self.paths)


Reach = Resize | Window | Chain | Parallel


@singledispatch
def reach(module: nn.Module) -> Reach:
    """What a module reads; of attention what the qkv projection and its scales read, as its sums see everything.

    Raises:
        TypeError: a module whose kernel sizes are not known.
    """
    raise TypeError(
        f"it is not known which pixels a {type(module).__name__} reads, so it cannot be tiled: call disable_tiling(), "
        "or register it with sana.models.autoencoder.halo.reach"
    )


def chain(modules: Sequence[nn.Module | None]) -> Chain:
    """What modules read that run one after the other."""
    return Chain(tuple(reach(module) for module in modules if module is not None))


def halo(reached: Reach) -> int:
    """Pixels of the input that are read beyond those on which the output pixels lie, at the more distant side."""
    first, last = reached.needed(0, reached.up)
    return max(0, -first, last - reached.down)


def _product(factors: object) -> int:
    result = 1
    for factor in factors:  # type: ignore[attr-defined]
        result *= factor
    return result


@reach.register(nn.Identity)
@reach.register(nn.ReLU)
@reach.register(nn.SiLU)
@reach.register(nn.GELU)
@reach.register(nn.BatchNorm2d)
@reach.register(RMSNorm2d)
def _pointwise(module: nn.Module) -> Reach:
    return Resize()


@reach.register
def _conv(module: nn.Conv2d) -> Reach:
    (kernel, across), (stride, _), (padding, _), (dilation, _) = (
        module.kernel_size, module.stride, module.padding, module.dilation,
    )  # fmt: skip
    assert kernel == across, "every kernel of a DC-AE is square"
    return Window(kernel, stride, int(padding), dilation, module.out_channels)


@reach.register
def _conv_layer(module: ConvLayer) -> Reach:
    return chain((module.conv, module.norm, module.act))


@reach.register
def _sequential(module: nn.Sequential) -> Reach:
    return chain(list(module))


@reach.register
def _op_sequential(module: OpSequential) -> Reach:
    return chain(list(module.op_list))


@reach.register
def _residual(module: ResidualBlock) -> Reach:
    return Parallel((reach(module.main), Resize() if module.shortcut is None else reach(module.shortcut)))


@reach.register
def _res_block(module: ResBlock) -> Reach:
    return chain((module.conv1, module.conv2))


@reach.register
def _glu(module: GLUMBConv) -> Reach:
    return chain((module.inverted_conv, module.depth_conv, module.glu_act, module.point_conv))


@reach.register
def _attention(module: LiteMLA) -> Reach:
    scales = Parallel((Resize(), *(reach(scale) for scale in module.aggreg)))
    return Chain((reach(module.qkv), scales, reach(module.proj)))


@reach.register
def _efficient_vit(module: EfficientViTBlock) -> Reach:
    return chain((module.context_module, module.local_module))


@reach.register
def _unshuffle(module: PixelUnshuffleDownsample) -> Reach:
    return Chain((reach(module.conv), Resize(down=2)))


@reach.register
def _shuffle(module: PixelShuffleUpsample) -> Reach:
    return Chain((reach(module.conv), Resize(up=2)))


@reach.register
def _interpolate(module: InterpolateUpsample) -> Reach:
    return Chain((Resize(up=2), reach(module.conv)))


@reach.register
def _average(module: ChannelAverage) -> Reach:
    return Resize(down=module.factor)


@reach.register
def _duplicate(module: ChannelDuplicate) -> Reach:
    return Resize(up=module.factor)
