"""Encoders of the official shapes with random weights: to time and test training where no weights can be had.

A run with them learns nothing of use; `build.py` refuses them together with `model.load_from`.
"""

import torch

from sana.config import ConfigError, SanaConfig
from sana.models import AUTOENCODERS
from sana.models.autoencoder.base import Autoencoder
from sana.models.autoencoder.dc_ae import DCAE, DCAE_PRESETS
from sana.models.text_encoder import TextEncoder
from sana.models.text_encoder.tiny import random_gemma2


def random_autoencoder(config: SanaConfig) -> Autoencoder:
    """A DC-AE of the preset that `vae.vae_pretrained` names."""
    preset = next((name for name in DCAE_PRESETS if name in config.vae.vae_pretrained), None)
    if AUTOENCODERS[config.vae.vae_type] is not DCAE or preset is None:
        raise ConfigError(
            f"train.extra.random_encoders has no layout for vae.vae_pretrained {config.vae.vae_pretrained!r}; it knows "
            f"{', '.join(DCAE_PRESETS)}."
        )
    return DCAE(DCAE_PRESETS[preset])


def random_text_encoder(config: SanaConfig, *, dtype: torch.dtype) -> TextEncoder:
    """A Gemma-2 of the 2B layout and `text_encoder.caption_channels` width."""
    text = config.text_encoder
    model, tokenizer = random_gemma2(text.caption_channels)
    return TextEncoder(
        model.to(dtype), tokenizer, model_max_length=text.model_max_length, chi_prompt=text.chi_prompt, name="random"
    )
