"""`SanaWebDataset` and `SanaWebDatasetMS`: captioned images in tar shards, read in any order.

Remote shards are fetched once; reading them as a stream is in `shard_stream.py`.
"""

import hashlib
import os
import random
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from sana.data.images import MAX_PIXELS
from sana.data.sample import DataError, Sample
from sana.data.shard_index import IMAGE_KINDS, KINDS
from sana.data.shard_list import beside, keep_wids_meta, list_shards, open_shards
from sana.data.shard_records import SQUARE, Record, RecordOptions, Scores, captions_of, make_sample
from sana.data.side_files import SideFile

if TYPE_CHECKING:
    from sana.data.feature_cache import FeatureCache


class SanaWebDataset:
    """Captioned images in tar shards, all of one size unless `multi_scale` is set.

    Every record is checked against the index of its shard; a shard that is cut, damaged or unsafe is an error at once.

    Args:
        data_dir: one or several folders, `.tar` files, `wids-meta.json`, or addresses of these; see `list_shards`.
        image_size: side of the square images without `multi_scale`, in pixels.
        aspect_ratio_type: table of `ASPECT_RATIOS` for `multi_scale`.
        multi_scale: each image goes to the size of its table whose ratio is nearest; False: all are `image_size`.
        transform: of `TRANSFORMS`, without `multi_scale`.
        external_caption_suffixes: endings of files `<shard><suffix>.json` with captions, `{key: {captioner: text}}`.
        external_clipscore_suffixes: endings of files with the captions' scores, `{key: {captioner: number}}`.
        clip_thr: captions of a lower score are not drawn.
        clip_thr_temperature: see `caption_probabilities`.
        sort_dataset: order the shards by name over all of `data_dir`.
        caption_lines: of a `.txt` member, "first" or "all".
        max_pixels: a larger image is broken.
        resize: "exact", as PIL scales pictures, or "fast", see `get_reader`.
        load_vae_feat: samples hold cached latents instead of images.
        load_text_feat: samples hold cached text features as well.
        feature_dir: a `FeatureCache` with them; None: the members `.npy` and `.npz`.
        cache_dir: where indexes and the output of commands are kept; None: beside the shards, ~/.cache/sana/shards.

    Raises:
        DataError: no usable shard; names the file and says what to do.
        FetchError: a remote shard cannot be had.
        ValueError: an argument that is not allowed or can take no effect.
    """

    def __init__(
        self,
        *,
        data_dir: str | Sequence[str],
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
        cache_dir: str | Path | None = None,
    ) -> None:
        if feature_dir is not None and not (load_vae_feat or load_text_feat):
            raise ValueError(f"feature_dir is {feature_dir}, but neither load_vae_feat nor load_text_feat is set.")
        self.options = RecordOptions(
            image_size, aspect_ratio_type, multi_scale, transform, clip_thr, clip_thr_temperature,
            caption_lines, max_pixels, load_vae_feat, load_text_feat, resize,
        )  # fmt: skip
        self.caption_suffixes, self.score_suffixes = external_caption_suffixes, external_clipscore_suffixes
        self.feature_dir = feature_dir
        self.shards = open_shards(list_shards(data_dir, sort=sort_dataset), cache_dir=cache_dir)
        self._starts = np.cumsum([0, *(len(index) for _, index in self.shards)])
        suffixes = dict.fromkeys((*self.caption_suffixes, *self.score_suffixes))
        self._side_paths = [
            {suffix: beside(entry.location, contents.path, suffix) for suffix in suffixes}
            for entry, contents in self.shards
        ]
        self._check_members()
        for place in [data_dir] if isinstance(data_dir, str | os.PathLike) else data_dir:
            if (folder := Path(place).expanduser()).is_dir():
                keep_wids_meta(self.shards, folder)
        self._buckets: list[str] | None = None
        self._side_files: dict[tuple[int, str], SideFile] = {}
        self._cache: FeatureCache | None = None
        self._verified: set[int] = set()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def key(self, index: int) -> str:
        """The shard's name and the record's key in it: "00000000/cat"."""
        shard, record = self._locate(index)
        entry, contents = self.shards[shard]
        return f"{entry.name}/{contents.keys[record]}"

    def fingerprint(self) -> str:
        """A hash of the names of the shards and of the keys in them, in their order."""
        digest = hashlib.sha256()
        for entry, contents in self.shards:
            digest.update("\n".join([f"shard {entry.name}", *contents.keys, ""]).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def buckets(self) -> list[str]:
        """The bucket of every image, by width and height in its JSON, else by the header of the image.

        An image of unknown size gets the bucket that most others have; `load` says what is wrong with it.
        """
        if self._buckets is None:
            self._buckets = self._find_buckets() if self.options.multi_scale else [SQUARE] * len(self)
        return self._buckets

    def captions(self, index: int) -> list[str]:
        """Reads all captions of an image, each text once.

        Raises:
            BrokenSampleError: as `scored_captions`.
        """
        return list(dict.fromkeys(self.scored_captions(index)[0].values()))

    def scored_captions(self, index: int) -> tuple[dict[str, str], Scores]:
        """Reads the captions of an image, {name: text}, and their scores, (name, score), in the order of the files.

        Raises:
            BrokenSampleError: they cannot be read, or there is none.
        """
        return captions_of(self._record(index), self.options.caption_lines)

    def image_bytes(self, index: int) -> bytes:
        """Returns the image file.

        Raises:
            BrokenSampleError: it cannot be read, or there is none.
        """
        return self._record(index).image_bytes()

    def load(self, index: int, rng: random.Random) -> Sample:
        """Reads one image, or its features, with the caption that `rng` draws.

        Raises:
            BrokenSampleError: the record cannot be read.
            DataError: a file beside the shard is damaged; cached features are missing or stale.
        """
        record, bucket = self._record(index), self.buckets()[index]
        cached = None if self.feature_dir is None else partial(self._cached_features, index, record, bucket)
        return make_sample(record, self.options, bucket, rng, cached=cached)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": None}

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def _record(self, index: int) -> Record:
        shard, position = self._locate(index)
        entry, contents = self.shards[shard]
        key = f"{entry.name}/{contents.keys[position]}"
        captions, scores = (
            [file.entry(position, key) for suffix in suffixes if (file := self._side_file(shard, suffix))]
            for suffixes in (self.caption_suffixes, self.score_suffixes)
        )
        kinds = [kind for kind in KINDS if contents.has(position, kind)]
        read = partial(contents.read, position, key=key)
        return Record(contents.keys[position], key, kinds, read, captions, scores)

    def _side_file(self, shard: int, suffix: str) -> SideFile | None:
        path = self._side_paths[shard][suffix]
        if path is None:
            return None
        if (shard, suffix) not in self._side_files:
            self._side_files[shard, suffix] = SideFile(path, self.shards[shard][1].keys)
        return self._side_files[shard, suffix]

    def _check_members(self) -> None:
        """At least one record must have what every sample needs."""
        if self.feature_dir is not None:
            return
        for option, kinds in (
            ("load_vae_feat", ("npy",) if self.options.load_vae_feat else IMAGE_KINDS),
            ("load_text_feat", ("npz",) if self.options.load_text_feat else ()),
        ):
            columns = [KINDS.index(kind) for kind in kinds]
            if columns and not any(contents.spans[:, columns, 0].any() for _, contents in self.shards):
                state = str(getattr(self.options, option)).lower()
                raise DataError(
                    f"data.{option} is {state}, and no record of {self.shards[0][1].path.parent} has a "
                    f".{'/.'.join(kinds)} member; see data.extra.feature_dir for features kept elsewhere."
                )

    def _find_buckets(self) -> list[str]:
        sizes = np.concatenate([contents.image_sizes for _, contents in self.shards])
        unique, where = np.unique(sizes, axis=0, return_inverse=True)
        named = [self.options.bucket(height, width) if height and width else "" for height, width in unique.tolist()]
        buckets = [named[position] for position in where.reshape(-1).tolist()]
        known = Counter(filter(None, buckets)).most_common(1)
        usual = known[0][0] if known else self.options.bucket(1, 1)
        return [bucket or usual for bucket in buckets]

    def _cached_features(self, index: int, record: Record, bucket: str, caption: str) -> dict[str, Tensor]:
        from sana.data.feature_cache import FeatureCache

        vae, text = self.options.load_vae_feat, self.options.load_text_feat
        self._cache = self._cache or FeatureCache(str(self.feature_dir))
        if vae and index not in self._verified:  # once per process: it reads the whole image
            self._cache.verify(record.key, record.image_bytes(), bucket=bucket)
            self._verified.add(index)
        return self._cache.get(record.key, vae=vae, text=text, caption=caption if text else None)


class SanaWebDatasetMS(SanaWebDataset):
    """As `SanaWebDataset`, with `multi_scale` on unless it is switched off."""

    def __init__(self, *, multi_scale: bool = True, **arguments: Any) -> None:
        super().__init__(multi_scale=multi_scale, **arguments)
