"""Modules with quantised weights: a linear layer, and the Mix-FFN around two of them. Products are in `kernels.py`."""

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from sana.models.quantization.kernels import KERNELS, pack
from sana.models.quantization.schemes import SCHEMES, check_shape
from sana.models.transformer.mix_ffn import ConvLayer, Grid, MixFFN
from sana.ops import linear
from sana.ops.backend import choose
from sana.ops.mix_ffn.cpu import chunk_rows
from sana.ops.mix_ffn.reference import depthwise_conv, to_image, to_tokens


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is stored by a scheme, in plain tensors named after it, as `int8_values`.

    It is moved by `.to(device)`, but keeps its precision whatever dtype the model is moved to; only the bias follows.

    Args:
        scheme: name of the scheme.
        shape: (N, K) of the weight.
        parts: the stored tensors, see `KERNELS`.
        bias: (N,), kept as it is.
    """

    bias: Tensor | None

    def __init__(self, scheme: str, shape: tuple[int, int], parts: Sequence[Tensor], bias: Tensor | None) -> None:
        super().__init__()
        self.scheme = scheme
        self.out_features, self.in_features = shape
        self.stored = tuple(f"{scheme.replace('-', '_')}_{name}" for name in KERNELS[scheme].names)
        for name, part in zip(self.stored, parts, strict=True):
            self.register_buffer(name, part)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def from_weight(
        cls, scheme: str, weight: Tensor, bias: Tensor | None, on: torch.device | None = None
    ) -> "QuantizedLinear":
        """Quantises a weight (N, K) or (N, K, 1, 1); the layer is on its device, and computes `on` another if so told.

        Raises:
            ValueError: the scheme cannot store this shape.
        """
        shape = check_shape(weight.shape, SCHEMES[scheme])
        return QuantizedLinear(scheme, shape, pack(scheme, weight, on), bias)

    @classmethod
    def empty(cls, scheme: str, weight: Tensor, bias: Tensor | None) -> "QuantizedLinear":
        """Returns the layer that a weight would become, its stored tensors on the meta device.

        Raises:
            ValueError: the scheme cannot store this shape.
        """
        shape = check_shape(weight.shape, SCHEMES[scheme])
        specs = KERNELS[scheme].specs(*shape)
        parts = [torch.empty(size, dtype=dtype, device="meta") for size, dtype in specs]
        return QuantizedLinear(scheme, shape, parts, bias)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The stored tensors."""
        return tuple(getattr(self, name) for name in self.stored)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(part.nbytes for part in self.parts)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), dtype of `x`."""
        shape = (self.out_features, self.in_features)
        return KERNELS[self.scheme].multiply(x, self.parts, shape, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the buffers as PyTorch asks; stored tensors change the device only."""
        device = fn(torch.empty(0, device=self.parts[0].device)).device
        for name, part in zip(self.stored, self.parts, strict=True):
            self._buffers[name] = part.to(device)
        if self.bias is not None:
            self._buffers["bias"] = fn(self.bias)
        return self


class QuantizedMixFFN(nn.Module):
    """`MixFFN` over tokens, so that its expansion and projection can be any linear layers.

    Both are those of the exact network until they are replaced; its depthwise convolution is shared for good.

    Args:
        exact: the network to replace.
    """

    def __init__(self, exact: MixFFN) -> None:
        super().__init__()
        self.act, self.glu_act, self.out_act = exact.act, exact.glu_act, exact.out_act
        self.dilation = exact.dilation
        self.inverted_conv: nn.Module = exact.inverted_conv
        self.depth_conv = exact.depth_conv
        self.point_conv: nn.Module = exact.point_conv
        self.train(exact.training)

    def forward(self, x: Tensor, HW: Grid) -> Tensor:
        """(B, N, D) -> (B, N, D); HW is the grid of the N tokens. On a CPU a large image goes through in parts."""
        height, width = HW
        reach = self.depth_conv.weight_bias[0].shape[-1] // 2 * self.dilation
        rows = height
        if choose("auto", x) == "cpu":
            rows = chunk_rows(HW, self.depth_conv.weight_bias[0].shape[0] // 2 * x.element_size(), reach)
        if rows >= height:
            return self._whole(x, HW, slice(None))
        images = []
        for image in x.split(1):  # an image is cut by its own size alone, so that its bits depend on no other one
            parts = []
            for top in range(0, height, rows):
                bottom = min(top + rows, height)
                low, high = max(top - reach, 0), min(bottom + reach, height)  # what the convolution reads
                kept = slice((top - low) * width, (bottom - low) * width)
                parts.append(self._whole(image[:, low * width : high * width], (high - low, width), kept))
            images.append(torch.cat(parts, dim=1))
        return torch.cat(images)

    def _whole(self, x: Tensor, HW: Grid, kept: slice) -> Tensor:
        """`forward` of a grid at once, of which some tokens are kept."""
        gated = self.gate(self.act(_over_tokens(self.inverted_conv, x)), HW)[:, kept]
        return self.out_act(_over_tokens(self.point_conv, gated))

    def gate(self, expanded: Tensor, HW: Grid) -> Tensor:
        """(B, N, 2M) -> (B, N, M): the depthwise convolution, then value times activated gate."""
        weight, bias = self.depth_conv.weight_bias
        value, gate = depthwise_conv(to_image(expanded, HW), weight, bias, self.dilation).chunk(2, dim=1)
        return to_tokens(value * self.glu_act(gate))


def _over_tokens(layer: nn.Module, x: Tensor) -> Tensor:
    """Applies a linear layer, or a 1x1 convolution, to tokens (B, N, C)."""
    if not isinstance(layer, ConvLayer):
        return layer(x)
    weight, bias = layer.weight_bias
    return linear(x, weight.flatten(1), bias)
