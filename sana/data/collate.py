"""Samples become a batch: stacked images or latents, padded text features. Nothing is read here."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from sana.data.sample import DataError, Sample


@dataclass(frozen=True, eq=False)
class Batch:
    """What one rank trains on in one micro-step. Either `images` or `latents` is there.

    Attributes:
        keys: of the samples asked for, for logs.
        captions: of the samples.
        weights: (B,) float32, of the samples in the loss: 1, or 0 where a broken sample's place holds another one.
            All may be 0.
        epoch: number of the epoch.
        images: (B, 3, H, W) uint8; `normalise_images` makes float32 in [-1, 1] of them where they are trained on.
        latents: (B, C, h, w), scaled, in the dtype that they are stored in.
        prompt_embeds: (B, L, D), zero behind each sample's own tokens.
        prompt_mask: (B, L) int64, 0 there.
    """

    keys: list[str]
    captions: list[str]
    weights: Tensor
    epoch: int
    images: Tensor | None = None
    latents: Tensor | None = None
    prompt_embeds: Tensor | None = None
    prompt_mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> "Batch":
        """Returns the batch with its tensors on a device; from pinned memory without waiting for the copy."""
        waits = torch.device(device).type != "cuda"
        return self._with({name: value.to(device, non_blocking=not waits) for name, value in self._tensors()})

    def pin_memory(self) -> "Batch":
        """Returns the batch in page-locked memory (called by torch's DataLoader)."""
        return self._with({name: value.pin_memory() for name, value in self._tensors()})

    def record_stream(self, stream: torch.Stream) -> None:
        """Tells the allocator that a CUDA stream other than the one of the copies reads the tensors."""
        for _, value in self._tensors():
            value.record_stream(stream)

    def _with(self, tensors: dict[str, Any]) -> "Batch":
        return replace(self, **tensors)

    def _tensors(self) -> list[tuple[str, Tensor]]:
        named = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return [(name, value) for name, value in named if isinstance(value, Tensor)]


def collate(samples: Sequence[Sample], keys: Sequence[str], weights: Sequence[float], epoch: int) -> Batch:
    """Makes a batch of samples.

    Args:
        samples: of one bucket; all have an image or all have latents, all have text features or none has.
        keys: of the samples asked for, where another may stand in for a broken one.
        weights: of the samples in the loss.
        epoch: number of the epoch.

    Raises:
        DataError: the samples do not fit together.
    """
    embeds, mask = _pad(samples)
    images, latents = _stack(samples, "image"), _stack(samples, "latents")
    if (images is None) == (latents is None):
        raise DataError(f"{samples[0].key}: a sample must have either an image or latents.")
    return Batch(
        keys=list(keys),
        captions=[sample.caption for sample in samples],
        weights=torch.tensor(weights, dtype=torch.float32),
        epoch=epoch,
        images=images,
        latents=latents,
        prompt_embeds=embeds,
        prompt_mask=mask,
    )


def _stack(samples: Sequence[Sample], name: str) -> Tensor | None:
    tensors = [getattr(sample, name) for sample in samples]
    if all(tensor is None for tensor in tensors):
        return None
    shapes = [None if tensor is None else tuple(tensor.shape) for tensor in tensors]
    for sample, shape in zip(samples, shapes, strict=True):
        if shape is None or shape != shapes[0]:
            raise DataError(
                f"{samples[0].key} and {sample.key} are in one bucket, but their {name} has shape {shapes[0]} and "
                f"{shape}. Make the cached sizes or features anew."
            )
    if all(tensor.ndim == 3 and tensor.permute(1, 2, 0).is_contiguous() for tensor in tensors):
        return torch.stack([tensor.permute(1, 2, 0) for tensor in tensors]).permute(0, 3, 1, 2)  # plain copies
    return torch.stack(tensors)


def _pad(samples: Sequence[Sample]) -> tuple[Tensor | None, Tensor | None]:
    """Pads text features to the longest of the batch; real tokens without a mask are all used."""
    embeds = [sample.prompt_embeds for sample in samples if sample.prompt_embeds is not None]
    if not embeds:
        return None, None
    if len(embeds) < len(samples) or len({embed.shape[1] for embed in embeds}) > 1:
        sizes = {sample.key: None if (e := sample.prompt_embeds) is None else tuple(e.shape) for sample in samples}
        raise DataError(f"Cached text features do not fit together: {sizes}. Make them anew with one text encoder.")
    length = max(embed.shape[0] for embed in embeds)
    padded = embeds[0].new_zeros(len(embeds), length, embeds[0].shape[1])
    mask = torch.zeros(len(embeds), length, dtype=torch.int64)
    for row, (sample, embed) in enumerate(zip(samples, embeds, strict=True)):
        tokens = embed.shape[0]
        padded[row, :tokens] = embed
        mask[row, :tokens] = 1 if sample.prompt_mask is None else sample.prompt_mask
    return padded, mask
