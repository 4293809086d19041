"""`SanaImgDataset`: folders of images with captions beside them. How files are found is in `image_records.py`."""

import hashlib
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sana.data.aspect_ratio import ASPECT_RATIOS, closest_ratio
from sana.data.captions import (
    CAPTION_LINES,
    PROMPT,
    captions_of_json,
    choose_caption,
    prompt_of,
    read_json,
    scores_of_json,
)
from sana.data.image_records import SHOWN, ImageRecord, find_records
from sana.data.images import MAX_PIXELS, get_reader, image_size
from sana.data.safe_arrays import read_npy, read_npz
from sana.data.sample import BrokenSampleError, DataError, Sample
from sana.data.size_index import image_sizes
from sana.data.transforms import bucket_transform, get_transform, picture_size
from sana.utils.logging import get_logger

if TYPE_CHECKING:
    from sana.data.feature_cache import FeatureCache

logger = get_logger(__name__)

Parsed = TypeVar("Parsed", dict[str, str], list[tuple[str, float]])
SQUARE = "1.0"  # the only bucket without multi_scale


class SanaImgDataset:
    """Images of folders, with captions in files beside them; `find_records` says which files count.

    For `name.png`: `name.txt` holds the caption "prompt"; `name<suffix>.json`, `{"name": {captioner: text}}`, more
    captions; `name<suffix>.json` of the score suffixes, `{"name": {captioner: number}}`, their CLIP scores;
    `name.npy` scaled latents and `name.npz` text features (`caption_feature`, `attention_mask`), where asked for.

    Unlike the official class the list is not repeated 2000 times, and a broken item is an error, not its neighbour.

    Args:
        data_dir: folder or folders.
        image_size: side of the square images without `multi_scale`, in pixels.
        aspect_ratio_type: table of `ASPECT_RATIOS` for `multi_scale`.
        multi_scale: each image goes to the size of its table whose ratio is nearest; False: all are `image_size`.
        transform: of `TRANSFORMS`, without `multi_scale`.
        external_caption_suffixes: endings of files with more captions, without ".json".
        external_clipscore_suffixes: endings of files with their scores, without ".json".
        clip_thr: captions of a lower score are not drawn.
        clip_thr_temperature: see `caption_probabilities`.
        sort_dataset: order by key over all folders, instead of folder by folder.
        caption_lines: of the text file, "first" or "all".
        max_pixels: a larger image is broken.
        resize: "exact", as PIL scales pictures, or "fast", see `get_reader`.
        load_vae_feat: samples hold cached latents instead of images.
        load_text_feat: samples hold cached text features as well.
        feature_dir: a `FeatureCache` with them; None: the files beside the image.

    Raises:
        DataError: there is no captioned image, or a folder cannot be read.
        ValueError: an argument that is not allowed or can take no effect.
    """

    def __init__(
        self,
        *,
        data_dir: str | Path | Sequence[str | Path],
        image_size: int = 512,
        aspect_ratio_type: str = "ASPECT_RATIO_1024",
        multi_scale: bool = False,
        transform: str = "default_train",
        external_caption_suffixes: Sequence[str] = (),
        external_clipscore_suffixes: Sequence[str] = (),
        clip_thr: float = 0.0,
        clip_thr_temperature: float = 1.0,
        sort_dataset: bool = False,
        caption_lines: str = "first",
        max_pixels: int = MAX_PIXELS,
        resize: str = "exact",
        load_vae_feat: bool = False,
        load_text_feat: bool = False,
        feature_dir: str | Path | None = None,
    ) -> None:
        if caption_lines not in CAPTION_LINES:
            raise ValueError(f"caption_lines is {caption_lines!r}; choose one of {', '.join(CAPTION_LINES)}.")
        if multi_scale and aspect_ratio_type not in ASPECT_RATIOS:
            raise ValueError(f"aspect_ratio_type is {aspect_ratio_type!r}; choose one of {', '.join(ASPECT_RATIOS)}.")
        self._read = get_reader(resize)
        if feature_dir is not None and not (load_vae_feat or load_text_feat):
            raise ValueError(f"feature_dir is {feature_dir}, but neither load_vae_feat nor load_text_feat is set.")
        self.image_size, self.transform = image_size, get_transform(transform)
        self.multi_scale, self.aspect_ratio_type = multi_scale, aspect_ratio_type
        self.caption_suffixes, self.score_suffixes = external_caption_suffixes, external_clipscore_suffixes
        self.clip_thr, self.clip_thr_temperature = clip_thr, clip_thr_temperature
        self.caption_lines, self.max_pixels = caption_lines, max_pixels
        self.load_vae_feat, self.load_text_feat, self.feature_dir = load_vae_feat, load_text_feat, feature_dir
        self.folders = [data_dir] if isinstance(data_dir, str | Path) else list(data_dir)
        self.records: list[ImageRecord] = find_records(self.folders, external_caption_suffixes)
        if sort_dataset:
            self.records.sort(key=lambda record: record.key)
        self._buckets: list[str] | None = None
        self._cache: FeatureCache | None = None
        self._verified: set[str] = set()

    def __len__(self) -> int:
        return len(self.records)

    def key(self, index: int) -> str:
        """The image's path relative to its data folder."""
        return self.records[index].key

    def fingerprint(self) -> str:
        """A hash of the keys in their order."""
        keys = "\n".join(record.key for record in self.records)
        return hashlib.sha256(keys.encode("utf-8", "surrogateescape")).hexdigest()

    def buckets(self) -> list[str]:
        """The bucket of every image, from the headers of the files; read once, and remembered in large folders.

        An image whose header cannot be read gets the bucket that most others have, so that it is drawn like them and
        `load` says what is wrong with it: it is counted as broken there.

        Raises:
            DataError: no header can be read.
        """
        if self._buckets is None:
            self._buckets = self._read_buckets() if self.multi_scale else [SQUARE] * len(self)
        return self._buckets

    def image_bytes(self, index: int) -> bytes:
        """Reads the image file as it is, for content hashes.

        Raises:
            BrokenSampleError: the file cannot be read.
        """
        return _bytes_of(self.records[index].path, self.key(index))

    def captions(self, index: int) -> list[str]:
        """Reads all captions of an image, each text once.

        Raises:
            BrokenSampleError: as `scored_captions`.
        """
        return list(dict.fromkeys(self.scored_captions(index)[0].values()))

    def scored_captions(self, index: int) -> tuple[dict[str, str], list[tuple[str, float]]]:
        """Reads the captions of an image, {name: text}, and their scores, (name, score), in the order of the files.

        Raises:
            BrokenSampleError: a file cannot be read, or there is no caption in any.
        """
        record = self.records[index]
        captions: dict[str, str] = {}
        scores: list[tuple[str, float]] = []
        if prompt := prompt_of(record, self.caption_lines):
            captions[PROMPT] = prompt
        for suffix in self.caption_suffixes:
            path = f"{record.stem}{suffix}.json"
            captions |= _parsed(captions_of_json, path, record)
        for suffix in self.score_suffixes:
            path = f"{record.stem}{suffix}.json"
            scores += _parsed(scores_of_json, path, record)
        if not captions:
            raise BrokenSampleError(record.key, "its caption is empty")
        return captions, scores

    def load(self, index: int, rng: random.Random) -> Sample:
        """Reads one image, or its features, with the caption that `rng` draws.

        Raises:
            BrokenSampleError: the image or a file beside it cannot be read.
            DataError: cached features are missing or stale.
        """
        record = self.records[index]
        captions, scores = self.scored_captions(index)
        kind, score = choose_caption(
            captions, scores, rng, clip_thr=self.clip_thr, clip_thr_temperature=self.clip_thr_temperature
        )
        features = self._features(index, captions[kind])
        return Sample(
            key=record.key,
            caption=captions[kind],
            caption_type=kind,
            clip_score="" if score is None else str(score),
            image=None if self.load_vae_feat else self._image(index),
            **features,
        )

    def _image(self, index: int) -> Tensor:
        record = self.records[index]
        picture = self._read(record.path, record.key, max_pixels=self.max_pixels)
        try:
            if not self.multi_scale:
                return self.transform(picture, self.image_size)
            table = ASPECT_RATIOS[self.aspect_ratio_type]
            ratio = self._buckets[index] if self._buckets else closest_ratio(*picture_size(picture), table)
            return bucket_transform(picture, *table[ratio], self.aspect_ratio_type)
        except ValueError as error:
            raise BrokenSampleError(record.key, str(error)) from error

    def _bucket(self, index: int) -> str:
        if not self.multi_scale:
            return SQUARE
        if self._buckets is not None:
            return self._buckets[index]
        record = self.records[index]
        size = image_size(record.path, record.key, max_pixels=self.max_pixels)
        return closest_ratio(*size, ASPECT_RATIOS[self.aspect_ratio_type])

    def _read_buckets(self) -> list[str]:
        table = ASPECT_RATIOS[self.aspect_ratio_type]
        sizes = image_sizes(self.folders, self.records, max_pixels=self.max_pixels)
        found = [size if isinstance(size, BrokenSampleError) else closest_ratio(*size, table) for size in sizes]
        broken = [entry for entry in found if isinstance(entry, BrokenSampleError)]
        buckets = [entry for entry in found if isinstance(entry, str)]
        if not buckets:
            raise DataError(f"None of the {len(self)} images can be read; the first: {broken[0]}.")
        if broken:
            shown = "; ".join(str(error) for error in broken[:SHOWN])
            logger.warning("%d of %d images cannot be read, among them %s", len(broken), len(found), shown)
        usual = Counter(buckets).most_common(1)[0][0]
        return [entry if isinstance(entry, str) else usual for entry in found]

    def _features(self, index: int, caption: str) -> dict[str, Tensor]:
        if not (self.load_vae_feat or self.load_text_feat):
            return {}
        if self.feature_dir is not None:
            return self._cached_features(index, caption)
        record = self.records[index]
        features: dict[str, Tensor] = {}
        if self.load_vae_feat:
            features["latents"] = _latents_beside(record)
            self._check_shape(record, features["latents"], self._bucket(index))
        if self.load_text_feat:
            features |= _text_features_beside(record)
        return features

    def _cached_features(self, index: int, caption: str) -> dict[str, Tensor]:
        from sana.data.feature_cache import FeatureCache

        record = self.records[index]
        self._cache = self._cache or FeatureCache(str(self.feature_dir))
        if self.load_vae_feat and record.key not in self._verified:  # once per process: it reads the whole file
            self._cache.verify(record.key, self.image_bytes(index), bucket=self._bucket(index))
            self._verified.add(record.key)
        return self._cache.get(
            record.key,
            vae=self.load_vae_feat,
            text=self.load_text_feat,
            caption=caption if self.load_text_feat else None,
        )

    def _check_shape(self, record: ImageRecord, latents: Tensor, bucket: str) -> None:
        size = ASPECT_RATIOS[self.aspect_ratio_type][bucket] if self.multi_scale else (self.image_size, self.image_size)
        if latents.ndim != 3 or latents.shape[1] * size[1] != latents.shape[2] * size[0]:
            raise BrokenSampleError(
                record.key, f"its latents have shape {tuple(latents.shape)}, which is no image of {size[0]} x {size[1]}"
            )


def _parsed(parse: Callable[[Any, str], Parsed], path: str, record: ImageRecord) -> Parsed:
    """Returns what `captions_of_json` or `scores_of_json` finds in a file that may be missing."""
    try:
        return parse(read_json(path, record.key), record.name)
    except ValueError as error:
        raise BrokenSampleError(record.key, f"{path}: {error}") from error


def _bytes_of(path: str, key: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BrokenSampleError(key, f"{path} cannot be read: {error}") from error


def _feature_file(record: ImageRecord, suffix: str, option: str) -> bytes:
    path = record.stem + suffix
    if not os.path.isfile(path):
        raise DataError(
            f"data.{option} is set, but {path} is missing: make the features with tools/cache_features.py and name "
            "their folder in data.extra.feature_dir, or switch the option off."
        )
    return _bytes_of(path, record.key)


def _latents_beside(record: ImageRecord) -> Tensor:
    content = _feature_file(record, ".npy", "load_vae_feat")
    try:
        return torch.from_numpy(read_npy(content).astype(np.float32))
    except ValueError as error:
        raise BrokenSampleError(record.key, f"its latents (.npy) cannot be read: {error}") from error


def _text_features_beside(record: ImageRecord) -> dict[str, Tensor]:
    """Reads the official text features, (1, L, D) with a mask (1, L), and trims them to the real tokens."""
    content = _feature_file(record, ".npz", "load_text_feat")
    try:
        arrays = read_npz(content, ("caption_feature", "attention_mask"))
    except ValueError as error:
        raise BrokenSampleError(record.key, f"its text features (.npz) cannot be read: {error}") from error
    feature = arrays.get("caption_feature")
    if feature is None or feature.ndim < 2:
        raise BrokenSampleError(record.key, "its text features (.npz) hold no caption_feature of (1, tokens, width)")
    embeds = torch.from_numpy(feature.astype(np.float32)).flatten(0, -2)
    real = arrays["attention_mask"].reshape(-1) if "attention_mask" in arrays else np.ones(len(embeds))
    if len(real) != len(embeds) or not real.any():
        raise BrokenSampleError(record.key, f"its text features have {len(embeds)} tokens, its mask {int(real.sum())}")
    length = int(real.nonzero()[0].max()) + 1
    return {"prompt_embeds": embeds[:length], "prompt_mask": torch.from_numpy(real[:length].astype(np.int64))}
