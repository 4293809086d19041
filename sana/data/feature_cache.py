"""Latents and text features on disk: safetensors shards, each with an index; reading them and telling stale ones.

What computes them is `sana/training/cache_features.py`; writing is `feature_writer.py`. No model is known here.

A folder holds `feature_cache.json` (the identities: which networks and settings made the features) and in `shards/`
pairs `NAME.safetensors` + `NAME.json`. The index of a shard is written after it, so a shard without index does not
count. Later names win over earlier ones. Tensors are named by content hashes: records of one content share them.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sana.data.sample import BrokenSampleError, DataError
from sana.utils.logging import get_logger

logger = get_logger(__name__)

FORMAT = 1
ABOUT_FILE = "feature_cache.json"
SHARD_FOLDER = "shards"
OPEN_SHARDS = 512  # mapped at a time by one process
Identities = Mapping[str, Mapping[str, Any]]


def image_hash(image_bytes: bytes) -> str:
    """SHA-256 of an image file, hexadecimal."""
    return hashlib.sha256(image_bytes).hexdigest()


def latents_hash(image: str, bucket: str, identity: Mapping[str, Any]) -> str:
    """The name of the latents of an image (`image_hash`) in a bucket, by one autoencoder and transform."""
    return _digest("latents", image, bucket, identity)


def text_hash(caption: str, identity: Mapping[str, Any]) -> str:
    """The name of the features of a caption, by one text encoder with its instruction and length."""
    return _digest("text", caption, identity)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@dataclass
class CachedRecord:
    """What the index says about one sample.

    Attributes:
        image: `image_hash` of its file when the latents were computed.
        bucket: the bucket that its image had.
        latents: name of its latents.
        captions: names of the features of its captions.
        broken: why it could not be cached; "" for a good sample.
    """

    image: str = ""
    bucket: str = ""
    latents: str = ""
    captions: tuple[str, ...] = ()
    broken: str = ""


class FeatureCache:
    """Cached features of a folder, by sample key.

    Shards are mapped on first use in each process, so worker processes may share it. The index is held in memory:
    about 1 kB for a sample.

    Args:
        feature_dir: a folder that `tools/cache_features.py` filled.

    Raises:
        DataError: the folder holds no features, or they are damaged or of another version.
    """

    def __init__(self, feature_dir: str | Path) -> None:
        self.folder = Path(feature_dir).expanduser()
        self.identities: dict[str, dict[str, Any]] = read_identities(self.folder)
        if not self.identities:
            raise DataError(f"{self.folder} holds no cached features (no {ABOUT_FILE}): {_remedy(self.folder)}.")
        self._records: dict[str, CachedRecord] = {}
        self._shards: list[Path] = []
        self._shard_of: dict[str, int] = {}  # name of latents or text features -> position in _shards
        self._open: dict[int, Any] = {}
        self._process = os.getpid()
        for index_file in sorted((self.folder / SHARD_FOLDER).glob("*.json")):
            self.add_shard(index_file)

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, sample_key: str) -> bool:
        record = self._records.get(sample_key)
        return record is not None and not record.broken

    def record(self, sample_key: str) -> CachedRecord | None:
        """What is known of a sample; None when it is not here."""
        return self._records.get(sample_key)

    def holds(self, name: str) -> bool:
        """Whether latents or text features of this name (`latents_hash`, `text_hash`) are here."""
        return name in self._shard_of

    def get(self, sample_key: str, *, vae: bool, text: bool, caption: str | None = None) -> dict[str, Tensor]:
        """Reads features of one sample.

        Args:
            sample_key: the data set's key.
            vae: read "latents" (C, h, w) in the stored dtype, scaled.
            text: read "prompt_embeds" (L, D) in the stored dtype, trimmed to real tokens, and "prompt_mask" (L,) int64.
            caption: whose features; None takes the first one that was cached for this sample.

        Raises:
            DataError: the sample, or this caption of it, was not cached.
            BrokenSampleError: it could not be read when the features were made.
        """
        record = self._known(sample_key)
        features: dict[str, Tensor] = {}
        if vae:
            if record.latents not in self._shard_of:
                raise DataError(f"The latents of {sample_key} are not in {self.folder}: {_remedy(self.folder)}.")
            features["latents"] = self._read(record.latents, "latents")
        if text:
            name = self._caption_name(sample_key, record, caption)
            features["prompt_embeds"] = self._read(name, "embeds")
            features["prompt_mask"] = self._read(name, "mask").long()
        return features

    def verify(
        self,
        sample_key: str,
        image_bytes: bytes | None = None,
        caption: str | None = None,
        *,
        bucket: str | None = None,
    ) -> None:
        """Compares what is given with what the features were made of; costs one hash of the bytes.

        Raises:
            DataError: the image file, its bucket or the caption differs: the features are stale.
        """
        record = self._known(sample_key)
        if image_bytes is not None and record.image and image_hash(image_bytes) != record.image:
            raise self._stale(sample_key, "its image file has changed since")
        if bucket is not None and record.bucket and bucket != record.bucket:
            raise self._stale(
                sample_key, f"they were made for the bucket {record.bucket}, and the image is now in {bucket}"
            )
        if caption is not None and "text" in self.identities:
            self._caption_name(sample_key, record, caption)

    def require(self, expected: Identities) -> None:
        """Compares identities key by key; what is not given is not compared.

        Args:
            expected: {"latents": {...}, "text": {...}}, as made by `sana.training.cache_features`, or parts of them.

        Raises:
            DataError: the features were made with other networks or settings; the first difference is named.
        """
        require_identities(self.folder, self.identities, expected)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}, "_process": None}

    def _known(self, sample_key: str) -> CachedRecord:
        record = self._records.get(sample_key)
        if record is None:
            raise DataError(
                f"{sample_key} is not among the {len(self)} samples of {self.folder}: {_remedy(self.folder)}."
            )
        if record.broken:
            raise BrokenSampleError(sample_key, record.broken)
        return record

    def _caption_name(self, sample_key: str, record: CachedRecord, caption: str | None) -> str:
        if "text" not in self.identities or not record.captions:
            raise DataError(f"The text features of {sample_key} are not in {self.folder}: {_remedy(self.folder)}.")
        name = record.captions[0] if caption is None else text_hash(caption, self.identities["text"])
        if name not in record.captions or name not in self._shard_of:
            raise self._stale(sample_key, f"the caption {_shortened(caption)} was not among its captions")
        return name

    def _stale(self, sample_key: str, reason: str) -> DataError:
        return DataError(f"The features of {sample_key} in {self.folder} are stale: {reason}: {_remedy(self.folder)}.")

    def _read(self, name: str, part: str) -> Tensor:
        position = self._shard_of[name]
        if self._process != os.getpid():  # a map of the parent process is not used after a fork
            self._open, self._process = {}, os.getpid()
        path = self._shards[position]
        try:
            if position not in self._open:
                if len(self._open) >= OPEN_SHARDS:
                    del self._open[next(iter(self._open))]
                self._open[position] = safe_open(path, framework="pt")
            return self._open[position].get_tensor(f"{name}.{part}")
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{path} cannot be read ({error}): delete it with its .json, and {_remedy(self.folder)}."
            ) from error

    def add_shard(self, index_file: Path) -> None:
        """Reads the index of one more shard; what it says wins over what is known.

        Raises:
            DataError: the shard is not as long as its index says.
        """
        shard = index_file.with_suffix(".safetensors")
        index = read_shard_index(index_file)
        if index is None:
            raise DataError(f"{shard} does not fit its index {index_file.name}: {_remedy(self.folder)}.")
        self._shards.append(shard)
        for name in index["names"]:
            self._shard_of[name] = len(self._shards) - 1
        for key, fields in index["samples"].items():
            known = self._records.get(key, CachedRecord())
            merged = known.__dict__ | {"broken": ""} | fields
            self._records[key] = CachedRecord(**merged | {"captions": tuple(merged["captions"])})


def read_identities(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the identities of a folder; {} when it is no cache.

    Raises:
        DataError: the file is damaged or of another version.
    """
    path = folder / ABOUT_FILE
    if not path.is_file():
        return {}
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["format"] == FORMAT:
            return {str(kind): dict(identity) for kind, identity in about["identities"].items()}
        found = about["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}): delete the folder and make the features again.") from error
    raise DataError(f"{path} has format {found}, and this program reads {FORMAT}: make the features again.")


def read_shard_index(index_file: Path) -> dict[str, Any] | None:
    """Returns the index of a shard; None when it is damaged, or its shard is missing or not as long as it says."""
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
        whole = os.path.getsize(index_file.with_suffix(".safetensors")) == index["bytes"]
        return index if whole and isinstance(index["samples"], dict) and isinstance(index["names"], list) else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: %s", index_file, error)
        return None


def require_identities(folder: Path, known: Identities, expected: Identities) -> None:
    """Compares the identities of a folder with expected ones, key by key; what is not expected is not compared.

    Raises:
        DataError: as `FeatureCache.require`.
    """
    for kind, wanted in expected.items():
        if kind not in known:
            raise DataError(f"{folder} holds no cached {kind}: {_remedy(folder)}.")
        if difference := first_difference(known[kind], wanted):
            raise DataError(
                f"The cached {kind} in {folder} are stale: {difference}; delete the folder or name another one, and "
                f"{_remedy(folder)}."
            )


def first_difference(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Words for the first key that differs, "" for none."""
    for key, value in wanted.items():
        if made.get(key) != value:
            return f"{key} was {_shortened(made.get(key))} and is now {_shortened(value)}"
    return ""


def _remedy(folder: Path) -> str:
    return f"run python tools/cache_features.py CONFIG --feature_dir={folder}"


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
