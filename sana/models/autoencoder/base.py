"""The interface of every autoencoder, and the only place where latents are scaled and shifted.

Networks are not here: a subclass says how one batch is encoded and decoded without scaling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

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
    _compile: bool = False
    _compiled: Callable[[Tensor], Tensor] | None = None

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
        return self._map(self._raw_decoder(), latents / self.scaling_factor + self.shift_factor)

    def prepare_for_decoding(
        self, dtype: torch.dtype | None = None, *, channels_last: bool = True, compile: bool = False
    ) -> Self:
        """Makes `decode` fast, in place: eval mode, frozen weights, their dtype and layout, compiled code.

        A later call replaces all that an earlier one asked for: `prepare_for_decoding(torch.float32,
        channels_last=False)` gives the layout of a fresh network back and drops compiled code, but neither the digits
        that a cast to 16 bits took nor gradients (`requires_grad_()`, `train()`). Encoding goes on to work, in the same
        dtype. To keep the original, prepare a `copy.deepcopy`; a copy of a compiled autoencoder compiles anew.

        Args:
            dtype: what weights are cast to, for instance bf16 on a GPU; None keeps theirs.
            channels_last: lay weights and images out with channels last in memory, as tensor cores and oneDNN want.
            compile: decode through `torch.compile`. The first call of a new size takes minutes for a large network;
                sizes after the second share code that leaves the size open.

        Returns:
            Itself.
        """
        self.eval().requires_grad_(False)
        self.to(dtype=dtype or self.dtype)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.to(memory_format=layout)  # type: ignore[call-overload]  # left out of the stubs
        self._compile, self._compiled = compile, None
        return self

    def _raw_decoder(self) -> Callable[[Tensor], Tensor]:
        if not self._compile or self.training:
            return self.raw_decode
        if self._compiled is None:
            self._compiled = torch.compile(self.raw_decode)
        return self._compiled

    def __getstate__(self) -> dict[str, Any]:
        # Compiled code cannot be copied, and would decode with the original's weights.
        return self.__dict__ | {"_compiled": None}

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
