"""Feed-forward networks of a Sana block, from the paper's Mix-FFN to the plain MLP. The arithmetic is in `sana.ops`."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sana.models.layers.activations import build_activation
from sana.models.layers.linear import Linear
from sana.models.transformer.architecture import SanaArchitecture
from sana.ops import mix_ffn, pre_glu_conv
from sana.ops.backend import plain_kind
from sana.ops.mix_ffn.reference import depthwise_conv, to_image, to_tokens

Grid = tuple[int, int]
Acts = tuple[str | None, ...]


class ConvLayer(nn.Module):
    """A convolution under the official key `conv`; its owner applies it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(*args, **kwargs)

    @property
    def weight_bias(self) -> tuple[Tensor, Tensor | None]:
        """The convolution's weight and bias."""
        return self.conv.weight, self.conv.bias

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return self.conv(x)


class MixFFN(nn.Module):
    """Gated inverted residual with a depthwise convolution (Sana, section 2.2; official `GLUMBConv`).

    Args:
        dim: width D of the tokens.
        hidden: width M of the value and of the gate.
        out_dim: width of the output, default D.
        kernel_size: of the depthwise convolution, odd.
        use_bias: biases of expansion, depthwise convolution and projection.
        acts: activations after the expansion, on the gate, after the projection.
        dilation: of the depthwise convolution.
    """

    backend = "auto"
    recompute_expansion = False  # in training: what is 2 M wide is computed again for the gradient instead of kept

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        out_dim: int | None = None,
        kernel_size: int = 3,
        use_bias: tuple[bool, bool, bool] = (True, True, False),
        acts: Acts = ("silu", "silu", None),
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.dilation = dilation
        self.act, self.glu_act, self.out_act = (build_activation(name) for name in acts)
        wide = 2 * hidden
        padding = kernel_size // 2 * dilation
        self.inverted_conv = ConvLayer(dim, wide, 1, bias=use_bias[0])
        self.depth_conv = ConvLayer(
            wide, wide, kernel_size, padding=padding, dilation=dilation, groups=wide, bias=use_bias[1]
        )
        self.point_conv = ConvLayer(hidden, out_dim or dim, 1, bias=use_bias[2])

    def forward(self, x: Tensor, HW: Grid) -> Tensor:
        """(B, N, D) -> (B, N, D); HW is the grid of the N tokens."""
        out = mix_ffn(
            x,
            HW,
            self.inverted_conv.weight_bias,
            self.depth_conv.weight_bias,
            self.point_conv.weight_bias,
            act=self.act,
            gate_act=self.glu_act,
            dilation=self.dilation,
            recompute=self.recompute_expansion and self.training,
            backend=self.backend,
        )
        return self.out_act(out)


class PreGluMBConv(nn.Module):
    """Inverted residual with the gate BEFORE the depthwise convolution (official `MBConvPreGLU`).

    Args:
        dim: width D of the tokens.
        hidden: width M after the gate.
        out_dim: width of the output, default D.
        kernel_size: of the depthwise convolution, odd.
        use_bias: biases of expansion, depthwise convolution and projection.
        acts: activations on the gate, after the depthwise convolution, after the projection.
    """

    backend = "auto"

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        out_dim: int | None = None,
        kernel_size: int = 3,
        use_bias: tuple[bool, bool, bool] = (True, True, False),
        acts: Acts = ("silu", "silu", None),
    ) -> None:
        super().__init__()
        self.glu_act, self.depth_act, self.out_act = (build_activation(name) for name in acts)
        self.inverted_conv = ConvLayer(dim, 2 * hidden, 1, bias=use_bias[0])
        self.depth_conv = ConvLayer(
            hidden, hidden, kernel_size, padding=kernel_size // 2, groups=hidden, bias=use_bias[1]
        )
        self.point_conv = ConvLayer(hidden, out_dim or dim, 1, bias=use_bias[2])

    def forward(self, x: Tensor, HW: Grid) -> Tensor:
        """(B, N, D) -> (B, N, D); HW is the grid of the N tokens."""
        out = pre_glu_conv(
            x,
            HW,
            self.inverted_conv.weight_bias,
            self.depth_conv.weight_bias,
            self.point_conv.weight_bias,
            gate_act=self.glu_act,
            act=self.depth_act,
            backend=self.backend,
        )
        return self.out_act(out)


class Mlp(nn.Module):
    """Two linear layers with a tanh-GELU between them.

    Args:
        dim: width D of the input.
        hidden: width between the layers.
        out_dim: width of the output, default D.
    """

    def __init__(self, dim: int, hidden: int, out_dim: int | None = None) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, out_dim or dim)

    def forward(self, x: Tensor, HW: Grid | None = None) -> Tensor:
        """(..., D) -> (..., D'); the grid is not needed."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DepthwiseMlp(Mlp):
    """`Mlp` with a depthwise 3x3 convolution after the activation (official `DWMlp`)."""

    def __init__(self, dim: int, hidden: int, out_dim: int | None = None) -> None:
        super().__init__(dim, hidden, out_dim)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, x: Tensor, HW: Grid | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D'); HW is the grid of the N tokens, default square."""
        if HW is None:
            HW = (int(x.shape[1] ** 0.5),) * 2
        hidden = F.gelu(self.fc1(x), approximate="tanh")
        hidden = depthwise_conv(to_image(hidden, HW), self.conv.weight, self.conv.bias)
        return self.fc2(to_tokens(hidden))


def build_feed_forward(architecture: SanaArchitecture) -> nn.Module:
    """Returns the feed-forward network of one block: a module called with (tokens, grid)."""
    dim = architecture.hidden_size
    kind, backend = plain_kind(architecture.ffn_type)
    hidden = int(dim * architecture.mlp_ratio)
    if kind == "glumbconv":
        return MixFFN(dim, hidden, acts=architecture.mlp_acts)
    if kind == "glumbconv_dilate":
        return MixFFN(dim, hidden, acts=architecture.mlp_acts, dilation=2)
    if kind == "mbconvpreglu":
        network = PreGluMBConv(dim, hidden, acts=architecture.mlp_acts)
        network.backend = backend
        return network
    return DepthwiseMlp(dim, hidden) if kind == "dwmlp" else Mlp(dim, hidden)
