"""Latents of drawn scenes: a pool encoded once, of which a few entries are redrawn at every step.

Encoding a scene costs as much as training on it, so a small model on a CPU trains from a pool that slowly changes.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sana.data.scenes import Scene, draw_scene, scenes
from sana.models.autoencoder.base import Autoencoder
from sana.training.train_state import load_train_state, save_train_state

ENCODE_BATCH = 8


def encode_scenes(autoencoder: Autoencoder, drawn: Sequence[Scene], *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Scaled latents (N, C, 8, 8) fp32 of N scenes, computed in `dtype`."""
    pixels = torch.stack([torch.from_numpy(draw_scene(scene)) for scene in drawn])
    images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    device = next(autoencoder.parameters()).device
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        raw = autoencoder.encoder(images.to(device))
    return (raw.float() - autoencoder.shift_factor) * autoencoder.scaling_factor


class ScenePool:
    """`size` captioned latents, drawn from the stream of `seed`.

    Args:
        autoencoder: encodes the scenes; its parameters stay fixed.
        size: entries of the pool.
        seed: of the scene stream; give every process its own.
        path: file that keeps the pool between runs.
    """

    def __init__(
        self, autoencoder: Autoencoder, size: int, seed: int, path: Path, *, show_progress: bool = False
    ) -> None:
        self.autoencoder, self.stream, self.next_slot = autoencoder, scenes(seed), 0
        saved = load_train_state(path)
        if saved is not None and len(saved["captions"]) == size:
            self.latents, self.captions = saved["latents"], saved["captions"]
            self.stream = scenes(seed + 2**20)  # what is drawn from now on is new
            return
        parts, self.captions = [], []
        for start in tqdm(
            range(0, size, ENCODE_BATCH), desc="encoding scenes", disable=not show_progress, mininterval=5
        ):
            drawn = [next(self.stream) for _ in range(min(ENCODE_BATCH, size - start))]
            parts.append(encode_scenes(autoencoder, drawn).half().cpu())
            self.captions += [scene.caption for scene in drawn]
        self.latents = torch.cat(parts)
        save_train_state(path, {"latents": self.latents, "captions": self.captions})

    def refresh(self, count: int) -> None:
        """Replaces the `count` oldest entries by new scenes."""
        if count == 0:
            return
        drawn = [next(self.stream) for _ in range(count)]
        for scene, latents in zip(drawn, encode_scenes(self.autoencoder, drawn), strict=True):
            self.latents[self.next_slot] = latents
            self.captions[self.next_slot] = scene.caption
            self.next_slot = (self.next_slot + 1) % len(self.captions)

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """`count` random entries: latents (count, C, 8, 8) fp32 and captions."""
        index = torch.randint(len(self.captions), (count,), generator=generator).tolist()
        return self.latents[index].float(), [self.captions[i] for i in index]
