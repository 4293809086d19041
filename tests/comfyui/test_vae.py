"""The VAE object: pictures and latents in ComfyUI's shapes, with the autoencoder's numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sana.models.autoencoder.loading import load_autoencoder
from tests.comfyui.conftest import BUNDLED, KIND, MODEL, Comfy


@pytest.fixture
def vae(comfy: Comfy) -> Any:
    return comfy.node("ExtraVAELoader", vae_name=BUNDLED, vae_type=KIND, dtype="auto")


def test_decoding_is_the_autoencoders_and_latents_are_unscaled(comfy: Comfy, vae: Any) -> None:
    judge = load_autoencoder(MODEL / "vae").requires_grad_(False)
    assert judge.scaling_factor != 1
    latents = torch.randn(2, 32, 3, 5)
    made = comfy.node("VAEDecode", vae=vae, samples={"samples": latents / judge.scaling_factor})
    assert made.shape == (2, 96, 160, 3) and made.dtype == torch.float32
    with torch.inference_mode():
        wanted = (judge.decode(latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert torch.equal(made, wanted)


def test_tiles_give_the_numbers_of_the_whole(comfy: Comfy, vae: Any) -> None:
    samples = {"samples": torch.randn(1, 32, 6, 9)}
    whole = comfy.node("VAEDecode", vae=vae, samples=samples)
    asked = []
    network = vae.first_stage_model
    decode = network.raw_decode_tiled
    network.raw_decode_tiled = lambda latents, tiling: asked.append(tiling) or decode(latents, tiling)
    tiled = comfy.node("VAEDecodeTiled", vae=vae, samples=samples, tile_size=64, overlap=0)
    assert len(asked) == 1 and network.tiling is None
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)


def test_encoding_gives_unscaled_latents_and_crops_around_the_middle(comfy: Comfy, vae: Any) -> None:
    judge = load_autoencoder(MODEL / "vae").requires_grad_(False)
    pictures = torch.rand(1, 70, 100, 4)  # alpha is left out
    latent = comfy.node("VAEEncode", vae=vae, pixels=pictures)["samples"]
    cut = pictures[:, 3:67, 2:98, :3].permute(0, 3, 1, 2)
    assert latent.shape == (1, 32, 2, 3)
    torch.testing.assert_close(latent * judge.scaling_factor, judge.encode(cut * 2 - 1), rtol=1e-5, atol=1e-5)
    tiled = vae.encode_tiled(pictures, tile_x=32, tile_y=32, overlap=8)
    torch.testing.assert_close(tiled, latent, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="below 32"):
        vae.encode(torch.rand(1, 20, 100, 3))


def test_short_memory_means_tiles(vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = vae.decode(samples := torch.randn(1, 32, 4, 20))
    decode, calls = vae.first_stage_model.decode, []

    def short(latents: Tensor) -> Tensor:
        calls.append(vae.first_stage_model.tiling)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no room")
        return decode(latents)

    monkeypatch.setattr(vae.first_stage_model, "decode", short)
    torch.testing.assert_close(vae.decode(samples), whole, rtol=0, atol=1e-5)
    assert calls[0] is None and calls[1] is not None and vae.first_stage_model.tiling is None


def test_what_cannot_be_decoded_is_said(vae: Any) -> None:
    with pytest.raises(ValueError, match=r"latents of 32 channels and got \(1, 4, 8, 8\)"):
        vae.decode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="not finite"):
        vae.decode(torch.full((1, 32, 1, 1), float("nan")))


def test_what_comfyui_asks_of_it(vae: Any) -> None:
    assert (vae.spacial_compression_decode(), vae.spacial_compression_encode()) == (32, 32)
    assert vae.temporal_compression_decode() is None
    vae.throw_exception_if_invalid()
