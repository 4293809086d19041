"""AutoencoderKL folders behind our interface, against diffusers' own calls and the official scaling formulas."""

import sys
from pathlib import Path

import pytest
import torch

from sana.models.autoencoder.kl import KLAutoencoder
from sana.models.autoencoder.loading import load_autoencoder
from sana.models.autoencoder.tiling import Tiling
from sana.models.checkpoint import CheckpointError

STYLES = {
    "sdxl": {"latent_channels": 4, "scaling_factor": 0.13025},
    "sd3": {
        "latent_channels": 16,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}


@pytest.fixture(params=STYLES)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, torch.nn.Module]:
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        **STYLES[request.param],
    ).eval()
    theirs.save_pretrained(tmp_path / "vae")
    return tmp_path, theirs


@torch.no_grad()
def test_it_scales_and_shifts_like_the_official_code(saved: tuple[Path, torch.nn.Module]) -> None:
    folder, theirs = saved
    ours = load_autoencoder(folder, sample_posterior=False)
    assert isinstance(ours, KLAutoencoder)
    assert (ours.latent_channels, ours.downsample_factor) == (theirs.config.latent_channels, 2)
    images = torch.rand(1, 3, 8, 12) * 2 - 1
    shift = theirs.config.shift_factor or 0
    expected = (theirs.encode(images).latent_dist.mean - shift) * theirs.config.scaling_factor
    latents = ours.encode(images)
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(ours.decode(latents), theirs.decode(theirs.encode(images).latent_dist.mean).sample)


@torch.no_grad()
def test_sampling_follows_the_generator_and_not_the_batch(saved: tuple[Path, torch.nn.Module]) -> None:
    folder, theirs = saved
    ours = load_autoencoder(folder)
    images = torch.rand(2, 3, 8, 8)
    both = ours.encode(images, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    single = [ours.encode(image, generator) for image in images.split(1)]
    assert torch.equal(both, torch.cat(single))
    drawn = theirs.encode(images[:1]).latent_dist.sample(torch.Generator().manual_seed(3))
    torch.testing.assert_close(both[:1] / ours.scaling_factor + ours.shift_factor, drawn)
    assert not torch.equal(both, ours.encode(images, torch.Generator().manual_seed(4)))


def test_the_dtype_is_cast(saved: tuple[Path, torch.nn.Module]) -> None:
    assert load_autoencoder(saved[0], dtype=torch.bfloat16).dtype == torch.bfloat16


def test_weights_that_do_not_fit(saved: tuple[Path, torch.nn.Module]) -> None:
    from safetensors.torch import load_file, save_file

    path = saved[0] / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    del state["encoder.conv_in.bias"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"encoder\.conv_in\.bias"):
        load_autoencoder(saved[0])
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="is no readable AutoencoderKL"):
        load_autoencoder(saved[0])


def test_without_diffusers_the_message_says_what_to_install(
    saved: tuple[Path, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(CheckpointError, match=r"needs the package diffusers: pip install 'sana-python\[diffusers\]'"):
        load_autoencoder(saved[0])


@torch.no_grad()
def test_tiling_is_that_of_diffusers_and_is_said_to_be_inexact_once(
    saved: tuple[Path, torch.nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    folder, theirs = saved
    ours, latents = load_autoencoder(folder), torch.randn(1, theirs.config.latent_channels, 12, 20)
    whole = ours.decode(latents)
    ours.enable_tiling()
    ours.enable_tiling(tile_sample_min_height=16, tile_sample_stride_width=12)
    assert caplog.text.count("not exact") == 1
    theirs.enable_tiling()  # whose tiles have the size that this network was made for, 16
    raw = latents / ours.scaling_factor + ours.shift_factor
    tiled = ours.decode(latents)
    torch.testing.assert_close(tiled, theirs.decode(raw).sample)
    assert not torch.allclose(tiled, whole, rtol=1e-3)
    assert (ours.tiling, ours.tiling_for(9000, 9000)) == (Tiling(16, 16, 12, 12), None)
    ours.enable_tiling(16, 16, 8, 8)
    theirs.tile_overlap_factor = 0.5
    torch.testing.assert_close(ours.decode(latents), theirs.decode(raw).sample)
    ours.disable_tiling()
    assert torch.equal(ours.decode(latents), whole)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((16, 32), "tile_sample_min_height 16 and tile_sample_min_width 32 differ"),
        ((16, 16, 8, 6), "tile_sample_stride_height 8 and tile_sample_stride_width 6 differ"),
        ((15,), "tile_sample_min_height must be a positive multiple of 2"),
        ((8, 8, 16), "tile_sample_stride_height 16 is larger"),
    ],
)
def test_tiles_that_are_refused(saved: tuple[Path, torch.nn.Module], sizes: tuple, message: str) -> None:
    ours = load_autoencoder(saved[0])
    with pytest.raises(ValueError, match=message):
        ours.enable_tiling(*sizes)
    assert ours.tiling is None and not ours.model.use_tiling
