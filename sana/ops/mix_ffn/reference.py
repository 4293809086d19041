"""The Mix-FFN of Sana in plain PyTorch, channels last. The module that owns the weights is not here."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]
WeightBias = tuple[Tensor, Tensor | None]


def mix_ffn(
    x: Tensor,
    grid: tuple[int, int],
    inverted: WeightBias,
    depth: WeightBias,
    point: WeightBias,
    *,
    act: Activation = F.silu,
    gate_act: Activation = F.silu,
    dilation: int = 1,
) -> Tensor:
    """Inverted residual with a gate: 1x1 convolution, depthwise convolution, gated linear unit, 1x1 convolution.

    Sana, section 2.2 ("Mix-FFN"). The value and the gate halves are computed apart, so that both stay contiguous:
    cutting the last axis of one wide tensor costs several times the gate itself on a CPU.

    Args:
        x: (B, N, D) tokens in row-major order of the grid.
        grid: (H, W) with H * W = N.
        inverted: weight (2M, D, 1, 1) and bias (2M,) of the expansion.
        depth: weight (2M, 1, k, k) and bias (2M,) of the depthwise convolution, k odd.
        point: weight (D', M, 1, 1) and bias of the projection.
        act: after the expansion.
        gate_act: on the gate half.
        dilation: of the depthwise convolution.

    Returns:
        (B, N, D').
    """
    image = to_image(x, grid)
    halves = []
    for half in (0, 1):
        expanded = act(F.conv2d(image, _half(inverted[0], half), _half(inverted[1], half)))
        halves.append(depthwise_conv(expanded, _half(depth[0], half), _half(depth[1], half), dilation))
        del expanded  # the largest of them is not held while the gate is computed
    value, gate = halves
    return to_tokens(F.conv2d(value * gate_act(gate), *point))


def pre_glu_conv(
    x: Tensor,
    grid: tuple[int, int],
    inverted: WeightBias,
    depth: WeightBias,
    point: WeightBias,
    *,
    gate_act: Activation = F.silu,
    act: Activation = F.silu,
) -> Tensor:
    """Inverted residual with the gate BEFORE the depthwise convolution (official `MBConvPreGLU`).

    Args:
        x: (B, N, D) tokens in row-major order of the grid.
        grid: (H, W) with H * W = N.
        inverted: weight (2M, D, 1, 1) and bias (2M,) of the expansion.
        depth: weight (M, 1, k, k) and bias (M,) of the depthwise convolution, k odd.
        point: weight (D', M, 1, 1) and bias of the projection.
        gate_act: on the gate half.
        act: after the depthwise convolution.

    Returns:
        (B, N, D').
    """
    value, gate = F.conv2d(to_image(x, grid), *inverted).chunk(2, dim=1)
    return to_tokens(F.conv2d(act(depthwise_conv(value * gate_act(gate), *depth)), *point))


def depthwise_conv(image: Tensor, weight: Tensor, bias: Tensor | None, dilation: int = 1) -> Tensor:
    """Convolves every channel with its own odd kernel, keeping height and width. (B, C, H, W) -> (B, C, H, W)."""
    padding = weight.shape[-1] // 2 * dilation
    return F.conv2d(image, weight, bias, padding=padding, dilation=dilation, groups=weight.shape[0])


def to_image(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, N, D) -> (B, D, H, W), channels last in memory, without a copy."""
    return x.unflatten(1, grid).permute(0, 3, 1, 2)


def to_tokens(image: Tensor) -> Tensor:
    """(B, D, H, W) -> (B, N, D), without a copy if channels are last in memory."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def _half(tensor: Tensor | None, index: int) -> Tensor | None:
    return None if tensor is None else tensor.chunk(2)[index]
