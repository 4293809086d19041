"""Autoencoders of Stable Diffusion XL and 3 (diffusers' `AutoencoderKL`) behind our interface.

The network itself is diffusers'; scaling and shifting happen in `base.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sana.models.autoencoder.base import Autoencoder
from sana.models.checkpoint import CheckpointError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class KLAutoencoder(Autoencoder):
    """A diffusers `AutoencoderKL`; its config gives the scale, the shift (None is 0), the channels and the factor.

    Args:
        model: the network.
        sample_posterior: `encode` draws from the posterior (as in training); False takes its mean.
    """

    def __init__(self, model: AutoencoderKL, *, sample_posterior: bool = True) -> None:
        super().__init__()
        self.model = model
        self.sample_posterior = sample_posterior
        self.scaling_factor = float(model.config.scaling_factor)
        self.shift_factor = float(model.config.shift_factor or 0.0)
        self.latent_channels = int(model.config.latent_channels)
        self.downsample_factor = 2 ** (len(model.config.block_out_channels) - 1)

    def raw_encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        posterior = self.model.encode(images).latent_dist
        return posterior.sample(generator) if self.sample_posterior else posterior.mode()

    def raw_decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents).sample


def load_kl(folder: Path, *, dtype: torch.dtype, sample_posterior: bool = True) -> KLAutoencoder:
    """Loads a diffusers folder with config.json and diffusion_pytorch_model.safetensors.

    Raises:
        CheckpointError: diffusers is not installed, or cannot read the folder.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise CheckpointError(
            f"{folder} is an AutoencoderKL, which needs the package diffusers: pip install 'sana-python[diffusers]'."
        ) from error
    try:
        model, info = AutoencoderKL.from_pretrained(folder, torch_dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder} is no readable AutoencoderKL: {str(error).splitlines()[0]}") from error
    if problems := {name: keys for name, keys in info.items() if keys}:
        raise CheckpointError(f"{folder} does not fit its own config: {problems}.")
    return KLAutoencoder(model, sample_posterior=sample_posterior)
