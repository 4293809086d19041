"""The Mix-FFN against one wide convolution cut in two, and its depthwise convolution against loops."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sana.ops import mix_ffn
from sana.ops.mix_ffn.reference import depthwise_conv, to_image, to_tokens
from tests.tolerance import assert_rms_close


def draw(dim: int, hidden: int, out: int) -> list[Tensor]:
    shapes = [(2 * hidden, dim, 1, 1), (2 * hidden,), (2 * hidden, 1, 3, 3), (2 * hidden,), (out, hidden, 1, 1)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def wide_form(x: Tensor, grid: tuple[int, int], weights: list[Tensor], dilation: int) -> Tensor:
    """Channels first, one expansion, one depthwise convolution, then the cut."""
    inverted, inverted_bias, depth, depth_bias, point = weights
    image = x.transpose(1, 2).reshape(x.shape[0], -1, *grid)
    hidden = F.conv2d(
        F.silu(F.conv2d(image, inverted, inverted_bias)), depth, depth_bias, 1, dilation, dilation, len(depth)
    )
    value, gate = hidden.chunk(2, dim=1)
    return F.conv2d(value * F.silu(gate), point).flatten(2).transpose(1, 2)


@pytest.mark.parametrize(("grid", "dilation"), [((1, 1), 1), ((3, 5), 1), ((4, 4), 2), ((2, 7), 2)])
def test_output_and_gradients_equal_the_wide_form(grid: tuple[int, int], dilation: int) -> None:
    weights = draw(6, 5, 4)
    x = torch.randn(2, grid[0] * grid[1], 6, dtype=torch.float64, requires_grad=True)
    inverted, inverted_bias, depth, depth_bias, point = weights
    out = mix_ffn(x, grid, (inverted, inverted_bias), (depth, depth_bias), (point, None), dilation=dilation)
    expected = wide_form(x, grid, weights, dilation)
    assert_rms_close(out, expected, what="o")
    cotangent = torch.randn_like(out)
    mine = torch.autograd.grad(out, [x, *weights], cotangent)
    theirs = torch.autograd.grad(expected, [x, *weights], cotangent)
    for name, own, other in zip(("dx", "d inverted", "d b1", "d depth", "d b2", "d point"), mine, theirs, strict=True):
        assert_rms_close(own, other, backward=True, what=name)


@pytest.mark.parametrize("dilation", [1, 2])
def test_depthwise_convolution_equals_loops(dilation: int) -> None:
    image, weight = torch.randn(1, 2, 4, 3), torch.randn(2, 1, 3, 3)
    expected = torch.zeros(1, 2, 4, 3)
    for channel in range(2):
        for row in range(4):
            for column in range(3):
                for i in range(3):
                    for j in range(3):
                        r, c = row + (i - 1) * dilation, column + (j - 1) * dilation
                        if 0 <= r < 4 and 0 <= c < 3:
                            expected[0, channel, row, column] += weight[channel, 0, i, j] * image[0, channel, r, c]
    torch.testing.assert_close(depthwise_conv(image, weight, None, dilation), expected)


def test_tokens_and_images_share_memory_and_order() -> None:
    tokens = torch.arange(2 * 6 * 3.0).view(2, 6, 3)
    image = to_image(tokens, (2, 3))
    assert image.data_ptr() == tokens.data_ptr()
    assert image[1, 2, 1, 0] == tokens[1, 3, 2]
    assert torch.equal(to_tokens(image), tokens)
