"""Which part of an autoencoder is the encoder, where it ends, and that writing loses nothing it must keep."""

import pytest
import torch

from sana.models.autoencoder.dc_ae import DCAE, DCAEConfig
from sana.models.autoencoder.kl import KLAutoencoder
from sana.models.autoencoder.loading import load_autoencoder
from sana.training.dcae_model import (
    encoder_of,
    encoder_parts,
    freeze_encoder,
    initial_autoencoder,
    last_layer,
    rounds_exactly,
    storage_dtype,
    write_autoencoder,
)


@pytest.fixture
def kl():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, layers_per_block=1, shift_factor=0.1,
    )  # fmt: skip
    return KLAutoencoder(network, sample_posterior=False).eval()


def test_a_fresh_model_starts_with_small_branches(dcae_shape):
    autoencoder = initial_autoencoder(None, dcae_shape, 0.3)
    gains = [p for name, p in autoencoder.named_parameters() if name.endswith("norm.weight")]
    assert gains and all((gain == 0.3).all() for gain in gains)


def test_the_last_layer_gives_the_three_channels(dcae_shape, kl):
    autoencoder = DCAE(DCAEConfig(**dcae_shape))
    latents = torch.randn(1, 4, 2, 2)
    for one in (autoencoder, kl):
        layer = last_layer(one)
        with torch.no_grad():
            before = one.raw_decode(latents)
            layer.mul_(2)
            owner = next(m for m in one.modules() if getattr(m, "weight", None) is layer)
            shift = owner.bias.view(-1, 1, 1) if owner.bias is not None else 0
            after = one.raw_decode(latents)
        if owner.weight.shape[0] == 3:  # nothing but this convolution stands before the image
            assert torch.allclose(after - shift, 2 * (before - shift), atol=1e-5)
        assert not torch.equal(before, after)


def test_a_frozen_encoder_leaves_the_decoder_to_learn(dcae_shape, kl):
    for autoencoder in (DCAE(DCAEConfig(**dcae_shape)), kl):
        autoencoder.train()
        freeze_encoder(autoencoder)
        latents = autoencoder.raw_encode(torch.randn(1, 3, 64, 64))
        assert not latents.requires_grad
        assert autoencoder.raw_decode(latents).requires_grad
        assert not any(part.training for part in encoder_parts(autoencoder))
    assert encoder_of(kl) is kl.model.encoder


def test_what_is_stored_in_bf16(dcae_shape):
    autoencoder = DCAE(DCAEConfig(**dcae_shape))
    assert storage_dtype(autoencoder, pretrained=False, frozen=False) == torch.bfloat16
    assert storage_dtype(autoencoder, pretrained=True, frozen=False) == torch.float32
    assert storage_dtype(autoencoder, pretrained=True, frozen=True) == torch.float32
    rounded = autoencoder.bfloat16().float()
    assert rounds_exactly(rounded, torch.bfloat16)
    assert storage_dtype(rounded, pretrained=True, frozen=True) == torch.bfloat16


def test_an_autoencoder_of_diffusers_is_written_in_its_format(tmp_path, kl):
    images = torch.randn(1, 3, 32, 32)
    kl.scaling_factor = 0.25
    write_autoencoder(kl, tmp_path / "vae", torch.float32)
    again = load_autoencoder(tmp_path / "vae", sample_posterior=False)
    assert again.scaling_factor == 0.25 and again.shift_factor == 0.1
    with torch.no_grad():
        assert torch.equal(again.encode(images), kl.encode(images))
        assert torch.equal(again.decode(torch.ones(1, 4, 4, 4)), kl.decode(torch.ones(1, 4, 4, 4)))
