"""Making a sample of the members of one record: image, captions, latents, text features. Nothing is opened here.

Members: `png|jpg|jpeg|webp`; `json` with `prompt`, `width`, `height`; `txt`, a caption where the JSON has none; `npy`,
scaled latents (C, h, w); `npz` with `caption_feature` (1, L, D) and `attention_mask` (1, L).
"""

import json
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sana.data.aspect_ratio import ASPECT_RATIOS, closest_ratio
from sana.data.captions import CAPTION_LINES, PROMPT, caption_of_text, captions_of_json, choose_caption, scores_of_json
from sana.data.images import EXTENSIONS, MAX_PIXELS, get_reader, image_size
from sana.data.safe_arrays import read_npy, read_npz
from sana.data.sample import BrokenSampleError, Sample
from sana.data.transforms import bucket_transform, get_transform

SQUARE = "1.0"  # the only bucket without multi_scale
Scores = list[tuple[str, float]]


@dataclass(frozen=True)
class RecordOptions:
    """How samples are made; the meaning of each is that of `SanaWebDataset`.

    Raises:
        ValueError: an argument that is not allowed.
    """

    image_size: int = 512
    aspect_ratio_type: str = "ASPECT_RATIO_1024"
    multi_scale: bool = True
    transform: str = "default_train"
    clip_thr: float = 0.0
    clip_thr_temperature: float = 1.0
    caption_lines: str = "first"
    max_pixels: int = MAX_PIXELS
    load_vae_feat: bool = False
    load_text_feat: bool = False
    resize: str = "exact"

    def __post_init__(self) -> None:
        if self.caption_lines not in CAPTION_LINES:
            raise ValueError(f"caption_lines is {self.caption_lines!r}; choose one of {', '.join(CAPTION_LINES)}.")
        if self.multi_scale and self.aspect_ratio_type not in ASPECT_RATIOS:
            known = ", ".join(ASPECT_RATIOS)
            raise ValueError(f"aspect_ratio_type is {self.aspect_ratio_type!r}; choose one of {known}.")
        if self.image_size < 1:
            raise ValueError(f"image_size is {self.image_size}; it must be at least 1 pixel.")
        get_transform(self.transform)
        get_reader(self.resize)

    def bucket(self, height: int, width: int) -> str:
        """The bucket of an image of this size."""
        return closest_ratio(height, width, ASPECT_RATIOS[self.aspect_ratio_type]) if self.multi_scale else SQUARE

    def size(self, bucket: str) -> tuple[int, int]:
        """(height, width) in pixels of the images of a bucket."""
        return ASPECT_RATIOS[self.aspect_ratio_type][bucket] if self.multi_scale else (self.image_size, self.image_size)


@dataclass(frozen=True)
class Record:
    """The members of a record.

    Attributes:
        name: its key inside the shard, which files beside the shard know it by.
        key: its name in the data set.
        kinds: of its members, lower case, without dot.
        read: kind -> content; raises BrokenSampleError.
        side_captions: entries {captioner: text} of the files beside the shard, in the order of their suffixes.
        side_scores: entries {captioner: number}, likewise.
    """

    name: str
    key: str
    kinds: Collection[str]
    read: Callable[[str], bytes]
    side_captions: Sequence[Any] = ()
    side_scores: Sequence[Any] = ()

    @property
    def image_kind(self) -> str | None:
        """The kind of its image; None without one."""
        return next((kind[1:] for kind in EXTENSIONS if kind[1:] in self.kinds), None)

    def image_bytes(self) -> bytes:
        """The image file.

        Raises:
            BrokenSampleError: there is none.
        """
        if self.image_kind is None:
            raise BrokenSampleError(self.key, f"it has no image, only {', '.join(sorted(self.kinds))}")
        return self.read(self.image_kind)

    def description(self) -> Mapping[str, Any]:
        """Its JSON; empty without one.

        Raises:
            BrokenSampleError: it is no JSON mapping.
        """
        if "json" not in self.kinds:
            return {}
        try:
            described = json.loads(self.read("json"))
        except (ValueError, RecursionError) as error:
            raise BrokenSampleError(self.key, f"its .json is damaged: {error}") from error
        if not isinstance(described, dict):
            raise BrokenSampleError(self.key, f"its .json holds {described!r:.80}, not a mapping")
        return described

    def image_size(self, options: RecordOptions) -> tuple[int, int]:
        """(height, width) by the JSON, else by the header of the image."""
        described = self.description()
        height, width = described.get("height"), described.get("width")
        if isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0:
            return height, width
        if self.image_kind is None:
            height, width = latents_of(self).shape[1:]
            return height, width
        return image_size(self.image_bytes(), self.key, max_pixels=options.max_pixels)


def captions_of(record: Record, caption_lines: str = "first") -> tuple[dict[str, str], Scores]:
    """Returns the captions of a record, {name: text}, and their scores in the order of the files.

    The JSON's `prompt` counts in full, as officially; `caption_lines` is about the text member.

    Raises:
        BrokenSampleError: one of them is damaged, or there is no caption.
    """
    described = record.description()
    captions: dict[str, str] = {}
    prompt = described.get(PROMPT)
    if not isinstance(prompt, str | None):
        raise BrokenSampleError(record.key, f"the prompt in its .json is {prompt!r:.80}, not a text")
    if not prompt and "txt" in record.kinds:
        prompt = caption_of_text(record.read("txt").decode("utf-8", "replace"), caption_lines)
    if prompt and prompt.strip():
        captions[PROMPT] = prompt
    scores: Scores = []
    try:
        for entry in record.side_scores:
            scores += scores_of_json({record.name: entry}, record.name)
        # Other captions may stand in the record's own JSON; a score tells which fields are captions.
        inside = ((name, described.get(name)) for name, _ in scores if name != PROMPT)
        captions |= {name: text for name, text in inside if isinstance(text, str) and text.strip()}
        for entry in record.side_captions:
            captions |= captions_of_json({record.name: entry}, record.name)
    except ValueError as error:
        raise BrokenSampleError(record.key, str(error)) from error
    if not captions:
        raise BrokenSampleError(record.key, "it has no caption: no prompt in its .json, and no .txt")
    return captions, scores


def make_sample(
    record: Record,
    options: RecordOptions,
    bucket: str,
    rng: random.Random,
    *,
    cached: Callable[[str], dict[str, Tensor]] | None = None,
) -> Sample:
    """Decodes a record.

    Args:
        record: its members.
        options: how.
        bucket: that it belongs to.
        rng: draws the caption.
        cached: gives `latents`, `prompt_embeds`, `prompt_mask` for the drawn caption, in place of the members.

    Raises:
        BrokenSampleError: what is needed is missing or damaged.
    """
    captions, scores = captions_of(record, options.caption_lines)
    kind, score = choose_caption(
        captions, scores, rng, clip_thr=options.clip_thr, clip_thr_temperature=options.clip_thr_temperature
    )
    features = cached(captions[kind]) if cached is not None else _features(record, options, bucket)
    return Sample(
        key=record.key,
        caption=captions[kind],
        caption_type=kind,
        clip_score="" if score is None else str(score),
        image=None if options.load_vae_feat else _image(record, options, bucket),
        **features,
    )


def latents_of(record: Record) -> Tensor:
    """Reads the latents of a record: (C, h, w) float32.

    Raises:
        BrokenSampleError: they are missing, damaged or not finite.
    """
    try:
        latents = torch.from_numpy(read_npy(record.read("npy")).astype(np.float32))
    except ValueError as error:
        raise BrokenSampleError(record.key, f"its .npy cannot be read: {error}") from error
    if latents.ndim != 3 or not latents.numel() or not latents.isfinite().all():
        raise BrokenSampleError(record.key, f"its .npy, of shape {tuple(latents.shape)}, holds no finite (C, h, w)")
    return latents


def text_features_of(record: Record) -> dict[str, Tensor]:
    """Reads `prompt_embeds` (L, D) float32 and `prompt_mask` (L,) int64, without the padding at the end.

    Raises:
        BrokenSampleError: they are missing, damaged, or do not fit one another.
    """
    try:
        arrays = read_npz(record.read("npz"), ("caption_feature", "attention_mask"))
    except ValueError as error:
        raise BrokenSampleError(record.key, f"its .npz cannot be read: {error}") from error
    if "caption_feature" not in arrays or arrays["caption_feature"].ndim < 2:
        raise BrokenSampleError(record.key, "its .npz holds no caption_feature of (tokens, width)")
    embeds = torch.from_numpy(arrays["caption_feature"].astype(np.float32)).flatten(0, -2)
    mask = torch.ones(len(embeds), dtype=torch.int64)
    if "attention_mask" in arrays:
        mask = torch.from_numpy(arrays["attention_mask"].astype(np.int64)).flatten()
    if len(mask) != len(embeds) or not mask.any() or not embeds.isfinite().all():
        raise BrokenSampleError(
            record.key, f"its .npz has {len(embeds)} tokens and a mask of {len(mask)}, or no numbers"
        )
    length = int(mask.nonzero().max()) + 1
    return {"prompt_embeds": embeds[:length], "prompt_mask": mask[:length]}


def _features(record: Record, options: RecordOptions, bucket: str) -> dict[str, Tensor]:
    features: dict[str, Tensor] = {}
    if options.load_vae_feat:
        features["latents"] = latents_of(record)
        _check_shape(record, features["latents"], options.size(bucket))
    if options.load_text_feat:
        features |= text_features_of(record)
    return features


def _image(record: Record, options: RecordOptions, bucket: str) -> Tensor:
    picture = get_reader(options.resize)(record.image_bytes(), record.key, max_pixels=options.max_pixels)
    try:
        if options.multi_scale:
            return bucket_transform(picture, *options.size(bucket), options.aspect_ratio_type)
        return get_transform(options.transform)(picture, options.image_size)
    except ValueError as error:
        raise BrokenSampleError(record.key, str(error)) from error


def _check_shape(record: Record, latents: Tensor, size: tuple[int, int]) -> None:
    height, width = latents.shape[1:]
    if height * size[1] != width * size[0]:
        shape = tuple(latents.shape)
        raise BrokenSampleError(
            record.key, f"its latents have shape {shape}, which is no image of {size[0]} x {size[1]}"
        )
