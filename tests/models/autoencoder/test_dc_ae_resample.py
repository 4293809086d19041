"""Upsampling folded into small convolutions against doubling and a 3x3 convolution, and when kernels are made anew."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sana.models.autoencoder import dc_ae_resample
from sana.models.autoencoder.dc_ae_resample import (
    ChannelDuplicate,
    InterpolateUpsample,
    build_upsample,
    interleave,
    subpixel_kernels,
)
from tests.tolerance import assert_rms_close


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4), (5, 3)])
def test_folded_kernels_are_the_same_function(height: int, width: int) -> None:
    x, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 6, height, width), (5, 6, 3, 3), (5,)))
    expected = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)
    actual = interleave(F.conv2d(x, subpixel_kernels(weight, 0), bias.repeat(4), padding=1))
    assert_rms_close(actual, expected)


@pytest.mark.parametrize(("wide", "narrow"), [(8, 4), (8, 8), (4, 8), (8, 2)])
def test_the_shortcut_is_one_tap(wide: int, narrow: int) -> None:
    shortcut, x = ChannelDuplicate(wide, narrow, 2), torch.randn(2, wide, 3, 5)
    kernels = subpixel_kernels(torch.zeros(narrow, wide, 3, 3), shortcut.repeats)
    assert torch.equal(interleave(F.conv2d(x, kernels, padding=1)), shortcut(x))


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("name", ["InterpolateConv", "ConvPixelShuffle"])
def test_upsampling_in_inference(name: str, shortcut: bool) -> None:
    layer, x = build_upsample(name, 8, 4, shortcut=shortcut), torch.randn(2, 8, 3, 5)
    expected, before = layer(x).detach(), x.clone()
    for frozen in (False, True):
        layer.requires_grad_(not frozen)
        with torch.no_grad():
            assert_rms_close(layer(x), expected, what=f"frozen={frozen}")
    with torch.inference_mode():
        assert_rms_close(layer(x), expected)
    assert torch.equal(x, before)
    assert_rms_close(layer(x), expected, what="after inference mode")


@torch.no_grad()
@pytest.mark.parametrize(("wide", "narrow", "sizes"), [(128, 64, (200, 212)), (32, 3, (340, 450))])
def test_a_part_of_an_image_is_rounded_as_the_whole(wide: int, narrow: int, sizes: tuple[int, ...]) -> None:
    """At sizes for which oneDNN sums 2x2 convolutions with a border of their own in another order."""
    layer = InterpolateUpsample(wide, narrow).requires_grad_(False)
    image = torch.randn(1, wide, max(sizes), max(sizes)).to(memory_format=torch.channels_last)
    inner = layer(image[..., :40, :40])[..., :78, :78]
    for size in sizes:
        assert torch.equal(layer(image[..., :size, :size])[..., :78, :78], inner), size


def test_frozen_kernels_are_folded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = [], dc_ae_resample.subpixel_kernels
    monkeypatch.setattr(dc_ae_resample, "subpixel_kernels", lambda *args: calls.append(1) or original(*args))
    layer, x = InterpolateUpsample(4, 4), torch.randn(1, 4, 3, 3)
    with torch.no_grad():
        for frozen, expected in ((True, 1), (False, 4)):
            layer.requires_grad_(not frozen)
            for _ in range(3):
                layer(x)
            assert len(calls) == expected


@torch.no_grad()
def test_changed_weights_are_folded_anew() -> None:
    layer, x = InterpolateUpsample(4, 4).requires_grad_(False), torch.randn(1, 4, 3, 3)

    def check(layer: InterpolateUpsample, what: str) -> None:
        conv = layer.conv.conv
        expected = F.conv2d(F.interpolate(x, scale_factor=2), conv.weight, conv.bias, padding=1)
        assert_rms_close(layer(x), expected, what=what)

    check(layer, "first")
    layer.conv.conv.weight.mul_(2)
    check(layer, "weight in place")
    layer.conv.conv.bias.add_(1)
    check(layer, "bias in place")
    layer.load_state_dict(InterpolateUpsample(4, 4).state_dict())
    check(layer, "loaded")
    layer.load_state_dict(InterpolateUpsample(4, 4).state_dict(), assign=True)
    check(layer, "assigned")
    layer.bfloat16().float()
    check(layer, "cast")
    layer.conv.conv.weight = nn.Parameter(torch.randn(4, 4, 3, 3), requires_grad=False)
    check(layer, "replaced")
    twin = copy.deepcopy(layer)
    twin.conv.conv.weight.neg_()
    check(twin, "copied")
    check(layer, "the copy's original")


def test_folding_is_for_float32_on_a_cpu() -> None:
    layer = InterpolateUpsample(4, 4).requires_grad_(False)
    x = torch.randn(1, 4, 3, 3)
    assert not layer.folds(x)  # gradients are on
    with torch.no_grad():
        assert layer.folds(x)
        assert not layer.folds(x.bfloat16())
        assert not layer.folds(x.to("meta"))
        layer.conv.conv = nn.Sequential(layer.conv.conv)  # wrapped, by an adapter for instance
        assert not layer.folds(x)
