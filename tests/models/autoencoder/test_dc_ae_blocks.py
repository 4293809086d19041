"""Layers of the DC-AE against their formulas in float64."""

import pytest
import torch

from sana.models.autoencoder.dc_ae_blocks import LiteMLA, attention_scales, build_block, relu_attention
from sana.models.autoencoder.dc_ae_layers import RMSNorm2d, build_norm
from sana.models.autoencoder.dc_ae_resample import ChannelAverage, ChannelDuplicate, build_downsample, build_upsample
from tests.tolerance import assert_rms_close

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def norm_formula(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.movedim(1, -1)
    return (x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight + bias).movedim(-1, 1)


def make_norm(channels: int, dtype: torch.dtype = torch.float32) -> RMSNorm2d:
    norm = RMSNorm2d(channels)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    return norm.to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rms_norm_matches_its_formula(dtype: torch.dtype, layout: torch.memory_format) -> None:
    norm = make_norm(24, dtype)
    x = (torch.randn(2, 24, 5, 7) * 300).to(dtype).to(memory_format=layout)  # squares overflow in fp16
    expected = norm_formula(x.double(), norm.weight.double(), norm.bias.double(), norm.eps)
    assert_rms_close(norm(x).double(), expected, dtype)
    assert norm(x).dtype == dtype


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rms_norm_gradients(layout: torch.memory_format) -> None:
    norm = make_norm(6, torch.float64)
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    parameters = (norm.weight, norm.bias)
    assert torch.autograd.gradcheck(lambda x, *_: norm(x), (x, *parameters))
    cotangent = torch.randn(2, 6, 3, 4, dtype=torch.float64)  # contiguous, whatever the layout of x
    ours = torch.autograd.grad(norm(x), (x, *parameters), cotangent)
    expected = torch.autograd.grad(norm_formula(x, *parameters, norm.eps), (x, *parameters), cotangent)
    for name, actual, wanted in zip(("x", "weight", "bias"), ours, expected, strict=True):
        assert_rms_close(actual, wanted, what=name, backward=True)


def test_rms_norm_is_not_rounded_by_autocast() -> None:
    norm, x = make_norm(16), torch.randn(1, 16, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = norm(x)
    assert torch.equal(inside, norm(x))


@pytest.mark.parametrize("tokens", [3, 8, 9, 50])  # both orders of multiplication around d = 8
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_relu_attention_is_normalised_attention(tokens: int, dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(2, 3, 8, tokens).mul(30).to(dtype) for _ in range(3))
    query, key = query.relu(), key.relu()
    scores = torch.einsum("bhdk,bhdq->bhkq", key.double(), query.double())
    weights = scores / (scores.sum(dim=2, keepdim=True) + 1e-15)
    expected = torch.einsum("bhdk,bhkq->bhdq", value.double(), weights)
    actual = relu_attention(query, key, value)
    assert actual.dtype == dtype
    assert_rms_close(actual.double(), expected, dtype)


def test_multi_scale_attention_doubles_the_heads() -> None:
    layer = LiteMLA(8, head_dim=4, scales=(5,), norm=None)
    assert layer.proj.conv.in_channels == 16
    assert layer(torch.randn(1, 8, 3, 6)).shape == (1, 8, 3, 6)


@pytest.mark.parametrize(("wide", "narrow", "factor"), [(8, 4, 2), (8, 8, 2), (4, 8, 2), (12, 3, 1), (6, 6, 1)])
def test_shortcuts_invert_each_other(wide: int, narrow: int, factor: int) -> None:
    """Averaging the duplicated channels gives the input back; so does no other order of the channels."""
    x = torch.randn(2, wide, 3, 5)
    if factor == 1:
        wide, narrow, x = narrow, wide, torch.randn(2, narrow, 3, 5)
    up, down = ChannelDuplicate(wide, narrow, factor), ChannelAverage(narrow, wide, factor)
    assert up(x).shape == (2, narrow, 3 * factor, 5 * factor)
    torch.testing.assert_close(down(up(x)), x)


def test_impossible_channel_counts_are_named() -> None:
    with pytest.raises(ValueError, match=r"6 \* 2\^2 channels divisible by 5"):
        ChannelAverage(6, 5, 2)
    with pytest.raises(ValueError, match=r"5 \* 2\^2 channels divisible by 6"):
        ChannelDuplicate(6, 5, 2)
    with pytest.raises(ValueError, match="width 48 is not divisible by the head dim 32"):
        build_block("EViT_GLU", 48, head_dim=32, norm="trms2d", act="silu")
    with pytest.raises(ValueError, match="divisible by 4, got 6"):
        build_downsample("ConvPixelUnshuffle", 8, 6, shortcut=False)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="'Attention': allowed are ResBlock, EViT_GLU and EViTS5_GLU"):
        build_block("Attention", 8, head_dim=4, norm=None, act=None)
    with pytest.raises(ValueError, match="allowed are Conv, ConvPixelUnshuffle"):
        build_downsample("Pool", 8, 8, shortcut=True)
    with pytest.raises(ValueError, match="allowed are InterpolateConv, ConvPixelShuffle"):
        build_upsample("Deconv", 8, 8, shortcut=True)
    with pytest.raises(ValueError, match="unknown norm 'ln'"):
        build_norm("ln", 8)
    with pytest.raises(ValueError, match="unknown activation 'tanh'"):
        build_block("ResBlock", 8, head_dim=4, norm=None, act="tanh")


@pytest.mark.parametrize(("name", "scales"), [("EViT_GLU", ()), ("EViTS5_GLU", (5,)), ("EViTS3S5_GLU", (3, 5))])
def test_scales_stand_in_the_block_name(name: str, scales: tuple[int, ...]) -> None:
    assert attention_scales(name) == scales
