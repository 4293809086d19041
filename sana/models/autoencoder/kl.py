"""Autoencoders of Stable Diffusion XL and 3 (diffusers' `AutoencoderKL`) behind our interface.

The network itself is diffusers'; scaling and shifting happen in `base.py`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sana.models.autoencoder.base import Autoencoder
from sana.models.autoencoder.tiling import Tiling, make_tiling
from sana.models.checkpoint import CheckpointError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

logger = logging.getLogger(__name__)


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

    def enable_tiling(
        self,
        tile_sample_min_height: float | None = None,
        tile_sample_min_width: float | None = None,
        tile_sample_stride_height: float | None = None,
        tile_sample_stride_width: float | None = None,
    ) -> None:
        """Turns on diffusers' blended tiling, which is not exact: its tiles do not know of each other.

        Attention and group norms of this network see the whole image, so no halo would do. Never done unasked.

        Args:
            tile_sample_min_height, tile_sample_min_width: height and width of a tile in pixels, which must be equal;
                None is the size that the network was made for.
            tile_sample_stride_height, tile_sample_stride_width: from one tile to the next, which must be equal; tiles
                are blended where they overlap. None is three quarters of the tile.

        Raises:
            ValueError: a size is no positive multiple of the downsampling factor, height and width differ, or the
                stride is larger than the tile.
        """
        size = _square("tile_sample_min", tile_sample_min_height, tile_sample_min_width)
        stride = _square("tile_sample_stride", tile_sample_stride_height, tile_sample_stride_width)
        least = int(self.model.config.sample_size) if size is None else size
        chosen = make_tiling(self.downsample_factor, least, least, stride, stride)
        overlap = 0.25 if stride is None else 1 - stride / least
        self.model.enable_tiling()
        self.model.tile_sample_min_size = chosen.height
        self.model.tile_latent_min_size = chosen.height // self.downsample_factor
        self.model.tile_overlap_factor = overlap
        step = int(self.model.tile_latent_min_size * (1 - overlap)) * self.downsample_factor
        if self.tiling is None:
            logger.warning(
                "tiling of an AutoencoderKL is not exact: attention and group norms see one tile instead of the image, "
                "and seams are blended"
            )
        self.tiling = Tiling(chosen.height, chosen.width, step, step)

    def disable_tiling(self) -> None:
        super().disable_tiling()
        self.model.disable_tiling()


def _square(name: str, height: float | None, width: float | None) -> float | None:
    """The one size of both sides, of which one may be left out."""
    if height is not None and width is not None and height != width:
        raise ValueError(
            f"{name}_height {height} and {name}_width {width} differ: tiles of an AutoencoderKL are square"
        )
    return width if height is None else height


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
