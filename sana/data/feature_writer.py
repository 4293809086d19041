"""Writing cached features: shards that appear whole or not at all, by any number of processes at once.

The layout is described, and read, in `feature_cache.py`.
"""

import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sana.data.feature_cache import (
    ABOUT_FILE,
    FORMAT,
    SHARD_FOLDER,
    FeatureCache,
    Identities,
    latents_hash,
    read_identities,
    read_shard_index,
    require_identities,
    text_hash,
)
from sana.utils.logging import get_logger

logger = get_logger(__name__)


class FeatureWriter:
    """Adds features to a folder. What other processes write meanwhile is not seen; readers merge everything.

    Leaving its `with` block writes the last, partly filled shard, unless an exception leaves it.

    Args:
        feature_dir: made when needed.
        identities: {"latents": {...}} and / or {"text": {...}}: everything that decides the features.
        rank: of this process; part of its shards' names.
        latents_dtype: stored dtype of latents.
        text_dtype: stored dtype of text features.
        shard_samples: a shard is written after this many samples,
        shard_bytes: or when it holds this many bytes.

    Raises:
        DataError: the folder holds features of another identity.
    """

    def __init__(
        self,
        feature_dir: str | Path,
        identities: Identities,
        *,
        rank: int = 0,
        latents_dtype: torch.dtype = torch.float16,
        text_dtype: torch.dtype = torch.bfloat16,
        shard_samples: int = 512,
        shard_bytes: int = 256 * 2**20,
    ) -> None:
        self.folder, self.rank = Path(feature_dir).expanduser(), rank
        self.latents_dtype, self.text_dtype = latents_dtype, text_dtype
        self.shard_samples, self.shard_bytes = shard_samples, shard_bytes
        (self.folder / SHARD_FOLDER).mkdir(parents=True, exist_ok=True)
        self._claim(identities)
        self._remove_damaged()
        self.cache = FeatureCache(self.folder)
        self._number = 1 + max((int(path.name[:8]) for path in self._indices()), default=0)
        self._tensors: dict[str, Tensor] = {}
        self._names: dict[str, None] = {}
        self._samples: dict[str, dict[str, Any]] = {}
        self._bytes = 0

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.flush()

    def latents_name(self, image: str, bucket: str) -> str:
        """The name that latents of an image (by `image_hash`) have here."""
        return latents_hash(image, bucket, self.cache.identities["latents"])

    def text_name(self, caption: str) -> str:
        """The name that the features of a caption have here."""
        return text_hash(caption, self.cache.identities["text"])

    def holds(self, name: str) -> bool:
        """Whether these features are stored, or are in the shard that is being filled."""
        return name in self._names or self.cache.holds(name)

    def add_latents(self, sample_key: str, image: str, bucket: str, latents: Tensor | None) -> None:
        """Adds the latents (C, h, w) of a sample; None when `holds` says that they are here already."""
        name = self.latents_name(image, bucket)
        if latents is not None:
            self._keep(name, {"latents": latents.to("cpu", self.latents_dtype)})
        self._note(sample_key, {"image": image, "bucket": bucket, "latents": name})

    def add_text(self, caption: str, embeds: Tensor, mask: Tensor) -> None:
        """Adds the features (L, D) and mask (L,) of a caption, cut after the last real token."""
        length = max(1, int(mask.nonzero().max()) + 1 if mask.any() else 1)
        self._keep(
            self.text_name(caption),
            {"embeds": embeds[:length].to("cpu", self.text_dtype), "mask": mask[:length].to("cpu", torch.uint8)},
        )

    def add_captions(self, sample_key: str, captions: Sequence[str]) -> None:
        """Says which captions, all added with `add_text`, a sample has."""
        self._note(sample_key, {"captions": list(dict.fromkeys(self.text_name(caption) for caption in captions))})

    def add_broken(self, sample_key: str, reason: str) -> None:
        """Says that a sample cannot be read, so that training skips it for the same reason."""
        self._note(sample_key, {"broken": reason or "unreadable"})

    def end_sample(self) -> None:
        """Writes a shard when enough is there; call it when everything of a sample has been added."""
        if len(self._samples) >= self.shard_samples or self._bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Writes what was added since the last shard: first the features, then the index that makes them count."""
        if not self._samples and not self._names:
            return
        shard = self._next_name()
        with_format = {"format": "pt"}
        write_atomically(shard, lambda path: save_file(self._tensors, path, metadata=with_format))
        index = {"bytes": shard.stat().st_size, "names": list(self._names), "samples": self._samples}
        text = json.dumps(index, ensure_ascii=False)
        write_atomically(shard.with_suffix(".json"), lambda path: path.write_text(text, encoding="utf-8"))
        self.cache.add_shard(shard.with_suffix(".json"))
        self._tensors, self._names, self._samples, self._bytes = {}, {}, {}, 0

    def _keep(self, name: str, parts: Mapping[str, Tensor]) -> None:
        for part, tensor in parts.items():
            self._tensors[f"{name}.{part}"] = tensor.detach().clone(memory_format=torch.contiguous_format)
            self._bytes += tensor.nbytes
        self._names[name] = None

    def _note(self, sample_key: str, fields: dict[str, Any]) -> None:
        self._samples.setdefault(sample_key, {}).update(fields)

    def _indices(self) -> list[Path]:
        return [path for path in (self.folder / SHARD_FOLDER).glob("*.json") if path.name[:8].isdigit()]

    def _next_name(self) -> Path:
        name = f"{self._number:08d}-{self.rank:05d}-{uuid.uuid4().hex[:6]}"  # unique: a second run may be going on
        self._number += 1
        return self.folder / SHARD_FOLDER / f"{name}.safetensors"

    def _claim(self, identities: Identities) -> None:
        """Writes the identities; a folder that has other ones is refused."""
        known = read_identities(self.folder)
        if known:
            require_identities(self.folder, known, {kind: identities[kind] for kind in identities if kind in known})
        merged = {**known, **{kind: dict(identity) for kind, identity in identities.items()}}
        if merged != known:
            text = json.dumps({"format": FORMAT, "identities": merged}, indent=1, ensure_ascii=False) + "\n"
            write_atomically(self.folder / ABOUT_FILE, lambda path: path.write_text(text, encoding="utf-8"))

    def _remove_damaged(self) -> None:
        for unfinished in (self.folder / SHARD_FOLDER).glob(f".*-{self.rank:05d}-*.part"):  # of a run that was killed
            unfinished.unlink(missing_ok=True)
        for index_file in self._indices():
            if read_shard_index(index_file) is None:
                logger.warning("%s and its index do not fit: removed, its features are made again", index_file)
                index_file.unlink(missing_ok=True)
                index_file.with_suffix(".safetensors").unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` make a file under another name, puts it on the disk, then gives it its name.

    A process that is killed, or a full disk, leaves no part of it under that name.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
