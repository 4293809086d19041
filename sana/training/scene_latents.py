"""Latents of drawn scenes: a pool encoded once, of which a few entries are redrawn at every step.

Encoding a scene costs as much as training on it, so a small model on a CPU trains from a pool that slowly changes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sana.data.collate import Batch
from sana.data.scenes import Scene, draw_scene, sample_scene
from sana.models.autoencoder.base import Autoencoder
from sana.utils.dtype import parse_dtype

ENCODE_BATCH = 8


def encode_scenes(autoencoder: Autoencoder, drawn: Sequence[Scene], *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Scaled latents (N, C, 8, 8) fp32 of N scenes, computed in `dtype`."""
    pixels = torch.stack([torch.from_numpy(draw_scene(scene)) for scene in drawn])
    images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    device = next(autoencoder.parameters()).device
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        raw = autoencoder.encoder(images.to(device).contiguous(memory_format=torch.channels_last))
    return (raw.float() - autoencoder.shift_factor) * autoencoder.scaling_factor


class SceneBatches:
    """Batches from a pool of captioned latents, of which the oldest few are redrawn after each batch.

    Args:
        autoencoder: encodes the scenes; its parameters stay fixed.
        batch_size: B.
        pool_size: entries of the pool.
        refresh: entries that are redrawn after a batch.
        seed: of the run; every rank draws scenes of its own.
        rank: of this process.
        dtype: "bf16", "fp16" or "fp32": what the autoencoder computes in.
        show_progress: of the first encoding of the whole pool.
    """

    fingerprint = "DrawnScenes"
    len_epoch = 100  # batches; there is no end of scenes, so this is a convention

    def __init__(
        self,
        autoencoder: Autoencoder,
        batch_size: int,
        *,
        pool_size: int,
        refresh: int,
        seed: int,
        rank: int = 0,
        dtype: str = "fp32",
        show_progress: bool = False,
    ) -> None:
        self.autoencoder, self.batch_size, self.refresh = autoencoder, batch_size, refresh
        self.dtype, self.show_progress = parse_dtype(dtype), show_progress
        self.pool_size, self.batches, self.drawn, self.next_slot = pool_size, 0, 0, 0
        self.scene_seed = seed * 100_003 + rank
        self.generator = torch.Generator().manual_seed(self.scene_seed)
        self.latents: Tensor | None = None
        self.captions: list[str] = []

    def next_batch(self) -> Batch:
        """B random entries of the pool: latents (B, C, 8, 8) fp32 and captions."""
        if self.latents is None:
            self._fill()
        assert self.latents is not None
        self.batches += 1
        index = torch.randint(self.pool_size, (self.batch_size,), generator=self.generator).tolist()
        batch = Batch(
            keys=[f"scene in slot {i}" for i in index],
            captions=[self.captions[i] for i in index],
            latents=self.latents[index].float(),
            weights=torch.ones(self.batch_size),
            epoch=self.epoch,
        )
        for scene, latents in self._draw(self.refresh):
            self.latents[self.next_slot], self.captions[self.next_slot] = latents, scene.caption
            self.next_slot = (self.next_slot + 1) % self.pool_size
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Everything, the latents included: an entry redrawn is never seen again, so it cannot be made anew."""
        return {
            "scene_seed": self.scene_seed, "batches": self.batches, "drawn": self.drawn, "next_slot": self.next_slot,
            "generator": self.generator.get_state(), "latents": self.latents, "captions": self.captions,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches, self.drawn = state["batches"], state["drawn"]
        if state.get("scene_seed", self.scene_seed) != self.scene_seed:
            return  # another process's: this one has joined, and fills a pool of its own
        self.next_slot = state["next_slot"]
        self.generator.set_state(state["generator"])
        self.latents, self.captions = state["latents"], list(state["captions"])
        self.pool_size = len(self.captions) or self.pool_size

    @property
    def epoch(self) -> int:
        """Of the batch handed out last, as for other data."""
        return max(0, self.batches - 1) // self.len_epoch

    @property
    def batches_left(self) -> int:
        return (self.epoch + 1) * self.len_epoch - self.batches

    def close(self) -> None:
        """Nothing to close."""

    def _fill(self) -> None:
        parts = []
        for start in tqdm(
            range(0, self.pool_size, ENCODE_BATCH),
            desc="encoding scenes",
            disable=not self.show_progress,
            mininterval=5,
        ):
            drawn = self._draw(min(ENCODE_BATCH, self.pool_size - start))
            parts.append(torch.stack([latents for _, latents in drawn]).half().cpu())
            self.captions += [scene.caption for scene, _ in drawn]
        self.latents = torch.cat(parts)

    def _draw(self, count: int) -> list[tuple[Scene, Tensor]]:
        """The next `count` scenes of this rank and their latents; scene n depends on the seed and n only."""
        drawn = [sample_scene(np.random.default_rng((self.scene_seed, self.drawn + number))) for number in range(count)]
        self.drawn += count
        return list(zip(drawn, encode_scenes(self.autoencoder, drawn, dtype=self.dtype), strict=True)) if drawn else []
