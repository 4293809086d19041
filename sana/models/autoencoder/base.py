"""The interface of every autoencoder, and the only place where latents are scaled and shifted.

Networks are not here: a subclass says how one batch is encoded and decoded without scaling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from sana.models.autoencoder.tiling import AUTO_TILE_PIXELS, Tiling, make_tiling
from sana.models.layers.residency import compute_dtype


class Autoencoder(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] <-> scaled latents (B, C, H / f, W / f).

    latents = (raw - shift_factor) * scaling_factor. In eval mode on a CPU the images of a batch run one by one, so
    that image i of a batch equals its own run bitwise, whatever the batch size.

    Attributes:
        scaling_factor: multiplies raw latents to about unit variance.
        shift_factor: subtracted from raw latents first (0 for DC-AE and SDXL).
        latent_channels: C.
        downsample_factor: f, image pixels per latent pixel along one side.
        tiling: what `enable_tiling` was told; None if it was not called. What a size gets says `tiling_for`.
        tiles_exactly: whether tiling gives the numbers of the whole run; then large images are tiled unasked.
        progress: whether a bar is shown on stderr for an image of many tiles; None: if that is a terminal.
    """

    scaling_factor: float
    shift_factor: float = 0.0
    latent_channels: int
    downsample_factor: int
    tiling: Tiling | None = None
    tiles_exactly: bool = False
    progress: bool | None = None
    _tiles_large: bool = True  # unasked
    _slices: bool = False
    _compile: bool = False
    _compiled: Callable[[Tensor], Tensor] | None = None
    _compiled_pieces: dict[int, Callable[[Tensor], Tensor]] | None = None

    def raw_encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Unscaled latents of one batch; `generator` is for autoencoders that sample a posterior."""
        raise NotImplementedError

    def raw_decode(self, latents: Tensor) -> Tensor:
        """Images of one batch of unscaled latents."""
        raise NotImplementedError

    def raw_encode_tiled(self, images: Tensor, tiling: Tiling) -> Tensor:
        """As `raw_encode` with mean posteriors, in tiles; only where `tiles_exactly`."""
        raise NotImplementedError

    def raw_decode_tiled(self, latents: Tensor, tiling: Tiling) -> Tensor:
        """As `raw_decode`, in tiles; only where `tiles_exactly`."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the network computes in."""
        return compute_dtype(self)

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents of images.

        Args:
            images: (B, 3, H, W) in [-1, 1]; H and W divisible by `downsample_factor`.
            generator: for autoencoders that sample a posterior; DC-AE draws nothing.

        Returns:
            (B, C, H / f, W / f) in the network's dtype.

        Raises:
            ValueError: for a wrong rank, channel count or size; tiling was enabled and gradients are wanted.
        """
        self._check_images(images)
        tiling = self._tiling_now(images, *images.shape[-2:])
        if tiling is None:
            raw = self._map(lambda batch: self.raw_encode(batch, generator), images)
        else:
            raw = self._map(lambda batch: self.raw_encode_tiled(batch, tiling), images, singly=True)
        return (raw - self.shift_factor) * self.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Images of scaled latents.

        Args:
            latents: (B, C, h, w), scaled.

        Returns:
            (B, 3, h * f, w * f), about [-1, 1], not clamped, in the network's dtype.

        Raises:
            ValueError: for a wrong rank or channel count; tiling was enabled and gradients are wanted.
        """
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(f"latents must be (B, {self.latent_channels}, h, w), got {tuple(latents.shape)}")
        height, width = (side * self.downsample_factor for side in latents.shape[-2:])
        tiling = self._tiling_now(latents, height, width)
        raw = latents / self.scaling_factor + self.shift_factor
        if tiling is None:
            return self._map(self._raw_decoder(), raw)
        return self._map(lambda batch: self.raw_decode_tiled(batch, tiling), raw, singly=True)

    def enable_tiling(
        self,
        tile_sample_min_height: float | None = None,
        tile_sample_min_width: float | None = None,
        tile_sample_stride_height: float | None = None,
        tile_sample_stride_width: float | None = None,
    ) -> None:
        """Encodes and decodes large images in tiles, which bounds the memory; diffusers' arguments and defaults.

        The numbers are those of the whole run: attention sees the whole image, and a tile of the convolutions is read
        with the halo that they need, whatever the overlap of the sizes here (diffusers blends that much of tiles that
        do not know of each other). A call replaces all of an earlier one. Images of a batch run one by one.

        Args:
            tile_sample_min_height, tile_sample_min_width: an image is cut if one of its sides, in pixels, is larger;
                None is 512, or the stride if that is larger.
            tile_sample_stride_height, tile_sample_stride_width: the most, in pixels of the image, that one tile makes;
                None is 448, or the size above if that is smaller.

        Raises:
            ValueError: a size is no positive multiple of the downsampling factor, or a stride is larger than the size.
        """
        sizes = (tile_sample_min_height, tile_sample_min_width, tile_sample_stride_height, tile_sample_stride_width)
        self.tiling = make_tiling(self.downsample_factor, *sizes)

    def disable_tiling(self) -> None:
        """Encodes and decodes every image whole, also those that would be tiled unasked."""
        self.tiling, self._tiles_large = None, False

    def tile_like(self, other: Autoencoder) -> Self:
        """Takes over what another one was told of tiles, slices and progress; for a copy that runs in its place.

        Returns:
            Itself.
        """
        self.tiling, self.progress = other.tiling, other.progress
        self._tiles_large, self._slices = other._tiles_large, other._slices
        return self

    def enable_slicing(self) -> None:
        """Runs the images of a batch one by one, on every device."""
        self._slices = True

    def disable_slicing(self) -> None:
        """Runs the images of a batch together, except in inference on a CPU."""
        self._slices = False

    def tiling_for(self, height: int, width: int) -> Tiling | None:
        """The tiles that an image of this size is cut into in inference; None: it is done whole."""
        if not self.tiles_exactly:
            return None
        if self.tiling is not None:
            return self.tiling if self.tiling.applies(height, width) else None
        return make_tiling(self.downsample_factor) if self._tiles_large and height * width > AUTO_TILE_PIXELS else None

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
        self._compile, self._compiled, self._compiled_pieces = compile, None, None
        return self

    def _compile_piece(self, number: int, piece: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The compiled form of a piece of tiled decoding, made at its first use."""
        self._compiled_pieces = self._compiled_pieces or {}
        if number not in self._compiled_pieces:
            self._compiled_pieces[number] = torch.compile(piece, dynamic=True)
        return self._compiled_pieces[number]

    def _tiling_now(self, batch: Tensor, height: int, width: int) -> Tiling | None:
        tiling = self.tiling_for(height, width)
        if tiling is None:
            return None
        wanted = batch.requires_grad or any(parameter.requires_grad for parameter in self.parameters())
        if not self.training and not (torch.is_grad_enabled() and wanted):
            return tiling
        if self.tiling is None:
            return None
        raise ValueError(
            f"tiling was enabled, and an image of {height}x{width} (height x width) is to be tiled where gradients are "
            "wanted or in training mode, which tiles do not serve: call eval() and use torch.no_grad(), or call "
            "disable_tiling()"
        )

    def _raw_decoder(self) -> Callable[[Tensor], Tensor]:
        if not self._compile or self.training:
            return self.raw_decode
        if self._compiled is None:
            self._compiled = torch.compile(self.raw_decode)
        return self._compiled

    def __getstate__(self) -> dict[str, Any]:
        # Compiled code cannot be copied, and would decode with the original's weights.
        return self.__dict__ | {"_compiled": None, "_compiled_pieces": None}

    def _map(self, function: Callable[[Tensor], Tensor], batch: Tensor, *, singly: bool = False) -> Tensor:
        batch = batch.to(self.dtype)
        singly = singly or self._slices or (batch.device.type == "cpu" and not self.training)
        if not singly or len(batch) <= 1:
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
