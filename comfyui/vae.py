"""The VAE object that ComfyUI's own nodes call: pictures and latents in ComfyUI's shapes. The network is sana's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sana.models.autoencoder.base import Autoencoder

from . import host


class SanaVAE:
    """A DC-AE behind the methods that VAEDecode, VAEEncode and their tiled forms call.

    Large pictures are decoded in tiles by themselves, and tiles give the numbers of the whole run: no seams.

    Args:
        autoencoder: with unscaled latents (`open_autoencoder`).
    """

    latent_dim = 2  # spatial axes
    output_channels = 3

    def __init__(self, autoencoder: Autoencoder) -> None:
        self.first_stage_model = autoencoder
        self.device = host.device("vae")
        self.offload_device = host.resting_device("vae")
        self.output_device = host.latent_device()
        self.latent_channels = autoencoder.latent_channels
        self.upscale_ratio = self.downscale_ratio = autoencoder.downsample_factor
        self.vae_dtype = autoencoder.dtype

    def decode(self, samples: Tensor, **_: object) -> Tensor:
        """Returns pictures (B, H, W, 3) in [0, 1] of unscaled latents (B, C, h, w).

        Raises:
            ValueError: the latents have another number of channels, or the picture is not finite.
        """
        if samples.ndim != 4 or samples.shape[1] != self.latent_channels:
            raise ValueError(
                f"This VAE decodes latents of {self.latent_channels} channels and got {tuple(samples.shape)}; "
                "it belongs to a Sana model."
            )
        with torch.inference_mode():
            try:
                images = self._decode(samples)
            except torch.OutOfMemoryError:
                host.free_all()  # tiles give the same numbers, in less memory
                images = self._tiled(None, None, lambda: self._decode(samples))
        if not torch.isfinite(images).all():
            raise ValueError(f"The decoder gave values that are not finite in {self.vae_dtype}; choose FP32 or BF16.")
        return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).to(self.output_device)

    def decode_tiled(
        self, samples: Tensor, tile_x: int | None = None, tile_y: int | None = None, **_: object
    ) -> Tensor:
        """`decode` in tiles of at most (tile_y, tile_x) latent pixels; the overlap changes nothing."""
        return self._tiled(tile_y, tile_x, lambda: self.decode(samples))

    def encode(self, pixels: Tensor, **_: object) -> Tensor:
        """Returns unscaled latents (B, C, h, w) of pictures (B, H, W, 3) in [0, 1], cropped around their middle."""
        factor = self.downscale_ratio
        for axis in (1, 2):
            side = pixels.shape[axis] // factor * factor
            if not side:
                raise ValueError(f"A picture of {tuple(pixels.shape[1:3])} (height, width) has a side below {factor}.")
            pixels = pixels.narrow(axis, (pixels.shape[axis] - side) // 2, side)
        images = pixels[..., :3].permute(0, 3, 1, 2) * 2 - 1
        with torch.inference_mode(), self._awake():
            return self.first_stage_model.encode(images.to(self.device)).float().to(self.output_device)

    def encode_tiled(self, pixels: Tensor, tile_x: int | None = None, tile_y: int | None = None, **_: object) -> Tensor:
        """`encode` in tiles of at most (tile_y, tile_x) pixels; the overlap changes nothing."""
        factor = self.downscale_ratio
        height, width = (None if side is None else max(1, side // factor) for side in (tile_y, tile_x))
        return self._tiled(height, width, lambda: self.encode(pixels))

    def spacial_compression_decode(self) -> int:
        """Pixels a latent pixel; the name is ComfyUI's."""
        return self.upscale_ratio

    def spacial_compression_encode(self) -> int:
        """Pixels a latent pixel; the name is ComfyUI's."""
        return self.downscale_ratio

    def temporal_compression_decode(self) -> None:
        """None: these are no videos."""

    def throw_exception_if_invalid(self) -> None:
        """Nothing to say: it was loaded."""

    def _decode(self, samples: Tensor) -> Tensor:
        with self._awake():
            return self.first_stage_model.decode(samples.to(self.device)).float()

    def _tiled(self, tile_y: int | None, tile_x: int | None, function: Callable[[], Tensor]) -> Tensor:
        """Runs `function` while the autoencoder is told to tile, in latent pixels; None is its own choice."""
        network, before = self.first_stage_model, self.first_stage_model.tiling
        height, width = (None if side is None else side * self.upscale_ratio for side in (tile_y, tile_x))
        network.enable_tiling(height, width, height, width)
        try:
            return function()
        finally:
            network.tiling = before

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """While it lasts, the network is on the device that it computes on."""
        self.first_stage_model.to(self.device)
        try:
            yield
        finally:
            self.first_stage_model.to(self.offload_device)
