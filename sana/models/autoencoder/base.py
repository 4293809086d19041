"""The interface of every autoencoder, and the only place where latents are scaled and shifted.

Networks are not here: a subclass says how one batch is encoded and decoded without scaling.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Autoencoder(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] <-> scaled latents (B, C, H / f, W / f).

    latents = (raw - shift_factor) * scaling_factor. In eval mode on a CPU the images of a batch run one by one, so
    that image i of a batch equals its own run bitwise, whatever the batch size.

    Attributes:
        scaling_factor: multiplies raw latents to about unit variance.
        shift_factor: subtracted from raw latents first (0 for DC-AE and SDXL).
        latent_channels: C.
        downsample_factor: f, image pixels per latent pixel along one side.
    """

    scaling_factor: float
    shift_factor: float = 0.0
    latent_channels: int
    downsample_factor: int

    def raw_encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Unscaled latents of one batch; `generator` is for autoencoders that sample a posterior."""
        raise NotImplementedError

    def raw_decode(self, latents: Tensor) -> Tensor:
        """Images of one batch of unscaled latents."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the network computes in."""
        return next(self.parameters()).dtype

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents of images.

        Args:
            images: (B, 3, H, W) in [-1, 1]; H and W divisible by `downsample_factor`.
            generator: for autoencoders that sample a posterior; DC-AE draws nothing.

        Returns:
            (B, C, H / f, W / f) in the network's dtype.

        Raises:
            ValueError: for a wrong rank, channel count or size.
        """
        self._check_images(images)
        raw = self._map(lambda batch: self.raw_encode(batch, generator), images)
        return (raw - self.shift_factor) * self.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Images of scaled latents.

        Args:
            latents: (B, C, h, w), scaled.

        Returns:
            (B, 3, h * f, w * f), about [-1, 1], not clamped, in the network's dtype.

        Raises:
            ValueError: for a wrong rank or channel count.
        """
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(f"latents must be (B, {self.latent_channels}, h, w), got {tuple(latents.shape)}")
        return self._map(self.raw_decode, latents / self.scaling_factor + self.shift_factor)

    def _map(self, function: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        batch = batch.to(self.dtype)
        if batch.device.type != "cpu" or self.training or len(batch) <= 1:
            return function(batch)
        return torch.cat([function(image) for image in batch.split(1)])

    def _check_images(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
        height, width = images.shape[-2:]
        if height % self.downsample_factor or width % self.downsample_factor or not height or not width:
            raise ValueError(
                f"image size {height}x{width} (height x width) is not divisible by {self.downsample_factor}, the "
                "downsampling factor of this autoencoder: resize or pad the image first"
            )
