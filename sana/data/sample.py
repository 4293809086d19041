"""What a data set gives to training: one captioned image, or its cached features, and the errors of reading one."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class DataError(RuntimeError):
    """The data cannot be used at all: the message names the folder or file and says what to do."""


class BrokenSampleError(DataError):
    """One record cannot be read; training skips it within a budget.

    Args:
        key: the record's key.
        reason: what is wrong, in words.
    """

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key, self.reason = key, reason

    def __reduce__(self) -> tuple:  # so that it crosses from a worker process
        return type(self), (self.key, self.reason)


@dataclass(frozen=True)
class Sample:
    """One captioned image. Either `image` or `latents` is there.

    Attributes:
        key: unique and stable name of the record, for logs.
        caption: the text.
        caption_type: where the caption came from: "prompt", or the name of a captioner.
        clip_score: of the caption, as text; "" where none was recorded.
        image: (3, H, W) uint8 (`sana.data.transforms.normalise_images` maps it to [-1, 1]).
        latents: (C, h, w), scaled, in the dtype that they are stored in.
        prompt_embeds: (L, D) cached text features, trimmed to real tokens.
        prompt_mask: (L,) int64.
    """

    key: str
    caption: str
    caption_type: str = "prompt"
    clip_score: str = ""
    image: Tensor | None = None
    latents: Tensor | None = None
    prompt_embeds: Tensor | None = None
    prompt_mask: Tensor | None = None


class Dataset(Protocol):
    """Random access to captioned images; everything but `load` is cheap and touches no image."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """The record's key."""
        ...

    def buckets(self) -> Sequence[str]:
        """The bucket of every record: records of one bucket have images of one size and can share a batch."""
        ...

    def load(self, index: int, rng: random.Random) -> Sample:
        """Reads one record. `rng` is the source of every choice (caption, flip); the same rng gives the same sample.

        Raises:
            BrokenSampleError: the record cannot be read.
        """
        ...

    def fingerprint(self) -> str:
        """A hash of the keys in their order: equal on every rank, and between a run and its resumption."""
        ...
