"""The derived halo against the gradient of one pixel of the output: layers, blocks, and whole runs of every preset."""

import dataclasses

import pytest
import torch
from torch import nn

from sana.models.autoencoder.dc_ae import DCAE, DCAE_PRESETS, DCAEConfig
from sana.models.autoencoder.dc_ae_blocks import GLUMBConv, LiteMLA, build_block
from sana.models.autoencoder.dc_ae_layers import ConvLayer
from sana.models.autoencoder.dc_ae_resample import build_downsample, build_upsample
from sana.models.autoencoder.halo import chain, halo, reach
from sana.models.autoencoder.streaming import Attention, Convolutions, _parts
from sana.models.autoencoder.tiling import Tiling

MODULES = {
    "convolution": ConvLayer(4, 4),
    "strided convolution": ConvLayer(4, 4, stride=2),
    "pointwise convolution": ConvLayer(4, 4, 1, norm="trms2d", act="silu"),
    "wide convolution": ConvLayer(4, 4, 7, norm="bn2d", act="gelu"),
    "residual block": build_block("ResBlock", 4, head_dim=4, norm="trms2d", act="relu"),
    "gated convolution": GLUMBConv(4, norm="trms2d", act="silu"),
    "convolution down": build_downsample("Conv", 4, 8, shortcut=True),
    "unshuffle down": build_downsample("ConvPixelUnshuffle", 4, 8, shortcut=True),
    "unshuffle without shortcut": build_downsample("ConvPixelUnshuffle", 4, 8, shortcut=False),
    "interpolate up": build_upsample("InterpolateConv", 8, 4, shortcut=True),
    "shuffle up": build_upsample("ConvPixelShuffle", 8, 4, shortcut=True),
    "shuffle without shortcut": build_upsample("ConvPixelShuffle", 8, 4, shortcut=False),
}
HALOS = {  # pixels at the /8 scale for decode, of the image for encode
    "dc-ae-f32c32-sana-1.0": (7, 36),
    "dc-ae-f32c32-sana-1.1": (7, 36),
    "dc-ae-f32c32-in-1.0": (15, 87),
    "dc-ae-f32c32-mix-1.0": (15, 87),
    "dc-ae-f64c128-in-1.0": (15, 87),
    "dc-ae-f64c128-mix-1.0": (15, 87),
    "dc-ae-f128c512-in-1.0": (15, 87),
    "dc-ae-f128c512-mix-1.0": (15, 87),
}


def reduced(config: DCAEConfig, **changes: object) -> DCAEConfig:
    """The same layers, eight channels wide."""
    widths = (8,) * len(config.encoder_width_list)
    sizes = {"latent_channels": 8, "head_dim": 4, "encoder_width_list": widths, "decoder_width_list": widths}
    return dataclasses.replace(config, **sizes | changes)


def at_the_image(model: DCAE, *, encodes: bool) -> Convolutions:
    """The run of convolutions that is tiled as the user says."""
    network = model.encoder if encodes else model.decoder
    parts = _parts(network.units(), Tiling(), encodes=encodes)
    found = parts[0 if encodes else -1]
    assert isinstance(found, Convolutions) and found.stride is not None
    assert [part.stride for part in parts if isinstance(part, Convolutions)].count(None) >= 1
    return found


def read(modules: list[nn.Module], channels: int, size: int, pixel: int, *, upright: bool = False) -> list[int]:
    """Pixels of the input along one side on which pixel `pixel` of the output depends: where the gradient is not 0."""
    x = torch.randn((1, channels, size, 8) if upright else (1, channels, 8, size), dtype=torch.float64)
    out = x.requires_grad_()
    for module in modules:
        out = module.double()(out)
    side = out.select(2 if upright else 3, pixel)
    (side * torch.randn_like(side)).sum().backward()
    assert x.grad is not None
    return x.grad.abs().sum((0, 1, 3 if upright else 2)).nonzero().flatten().tolist()


def assert_derived_is_read(modules: list[nn.Module], channels: int, size: int, *, upright: bool = False) -> None:
    derived = chain(modules)
    middle = size // 2 * derived.up // derived.down
    for pixel in range(middle, middle + derived.up):
        start, stop = derived.needed(pixel, pixel + 1)
        assert 0 < start < stop < size, "the test is too small"
        assert read(modules, channels, size, pixel, upright=upright) == list(range(start, stop))


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_a_module_reads_what_was_derived(name: str, upright: bool) -> None:
    module = MODULES[name].eval()
    channels = next(parameter for parameter in module.parameters() if parameter.ndim == 4).shape[1]
    assert_derived_is_read([module], channels, 16, upright=upright)


@pytest.mark.parametrize("encodes", [False, True])
@pytest.mark.parametrize("name", ["dc-ae-f32c32-sana-1.0", "dc-ae-f32c32-in-1.0"])
def test_the_convolutions_of_a_preset_read_what_was_derived(name: str, encodes: bool) -> None:
    run = at_the_image(DCAE(reduced(DCAE_PRESETS[name])).eval(), encodes=encodes)
    assert halo(run.reach) == HALOS[name][encodes]
    assert_derived_is_read(list(run.units), 3 if encodes else 8, 192 if encodes else 36)


@pytest.mark.parametrize("name", DCAE_PRESETS)
def test_halos_of_the_presets(name: str) -> None:
    with torch.device("meta"):
        model = DCAE(DCAE_PRESETS[name])
    runs = [at_the_image(model, encodes=encodes).reach for encodes in (False, True)]
    assert tuple(halo(run) for run in runs) == HALOS[name]
    assert [(run.up, run.down) for run in runs] == [(8, 1), (1, 8)], "the first stages without attention"


@pytest.mark.parametrize(("scales", "expected"), [((), 0), ((5,), 2), ((3, 7), 3)])
def test_attention_reads_what_its_scales_read(scales: tuple[int, ...], expected: int) -> None:
    attention = LiteMLA(8, head_dim=4, scales=scales, norm="trms2d").eval()
    assert halo(reach(attention)) == expected
    parts = [nn.Sequential(attention.qkv, scale) for scale in attention.aggreg]
    for part in parts:
        kernel = part[1][0].kernel_size[0]
        assert len(read([part], 8, 16, 8)) == kernel <= 2 * expected + 1


def test_a_block_of_attention_reads_the_sum() -> None:
    block = build_block("EViTS5_GLU", 8, head_dim=4, norm="trms2d", act="silu")
    assert halo(Attention(block).reach) == 3
    assert reach(block.local_module).widest() == 64
    assert reach(block.context_module).widest() == 24


def test_the_widest_map_is_the_one_with_most_numbers() -> None:
    """Counted by hooks on the convolutions, for one pixel of the input."""
    model = DCAE(reduced(DCAE_PRESETS["dc-ae-f32c32-in-1.0"], decoder_width_list=(8, 8, 16, 32, 64, 64))).eval()
    run, sizes = at_the_image(model, encodes=False), []
    for unit in run.units:
        for module in unit.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda _, inputs, out: sizes.append(out.numel()))
    x = torch.randn(1, 32, 4, 4)
    for unit in run.units:
        x = unit(x)
    assert run.reach.widest() * 16 == max(sizes)


def test_a_module_of_unknown_kernel_is_refused() -> None:
    with pytest.raises(TypeError, match="not known which pixels a MaxPool2d reads.*disable_tiling"):
        chain([nn.ReLU(), None, nn.MaxPool2d(2)])
