"""What travels along links is checked where `SanaSampler` reads it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from comfyui.values import LatentShape, SanaModel, read_conditioning, read_empty_latent, require_gemma

CHANNELS = 8


def conditioning(**extra: Any) -> list[list[Any]]:
    return [[torch.zeros(1, 4, CHANNELS), {"attention_mask": torch.ones(1, 4), "sana_padding": "zero", **extra}]]


@pytest.fixture
def model() -> SanaModel:
    pipeline: Any = SimpleNamespace(autoencoder=LatentShape(32, 32))
    return SanaModel(pipeline, 0.41407, 0.0, "a model")


def test_a_conditioning_is_taken_apart() -> None:
    embeds, mask, extra = read_conditioning(conditioning(img_hw=[[1, 1]], pooled_output=None), "positive", CHANNELS)
    assert (embeds.shape, mask.shape, extra["sana_padding"]) == ((1, 4, CHANNELS), (1, 4), "zero")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (conditioning() * 2, "reads one text as negative, and 2 were combined"),
        ([[torch.zeros(1, 4, CHANNELS), {}]], "carries no mask"),
        ([[torch.zeros(2, 4, CHANNELS), {"attention_mask": torch.ones(2, 4)}]], "carries no mask"),
        ([[torch.zeros(1, 4, 9), {"attention_mask": torch.ones(1, 4)}]], "9 numbers a token and this model reads 8"),
        (conditioning(area=(1, 1, 0, 0), mask=torch.ones(1)), "does not follow area, mask of the negative"),
        (conditioning(start_percent=0.5), "does not follow start_percent"),
    ],
)
def test_what_the_sampler_cannot_follow_is_refused(given: list[list[Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_conditioning(given, "negative", CHANNELS)


@pytest.mark.parametrize(
    ("latent", "message"),
    [
        ({"samples": torch.zeros(1, 4, 64, 64)}, r"32 channels and this LATENT has the shape \(1, 4, 64, 64\)"),
        ({"samples": torch.ones(1, 32, 8, 8)}, "holds a picture or a mask"),
        ({"samples": torch.zeros(1, 32, 8, 8), "noise_mask": torch.ones(1, 8, 8)}, "holds a picture or a mask"),
    ],
)
def test_a_latent_only_gives_the_size(model: SanaModel, latent: dict[str, Any], message: str) -> None:
    assert read_empty_latent({"samples": torch.zeros(2, 32, 8, 4)}, model).shape == (2, 32, 8, 4)
    with pytest.raises(ValueError, match=message):
        read_empty_latent(latent, model)


def test_another_packs_text_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match=r"GEMMA of another node pack \(dict\)"):
        require_gemma({"tokenizer": None, "text_encoder": None})


def test_unscaled_latents_are_what_the_network_reads(model: SanaModel) -> None:
    latents = torch.randn(2, 32, 4, 4)
    assert torch.equal(model.unscaled(latents), latents / 0.41407 + 0.0)
