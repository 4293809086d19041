"""The index of a tar shard: which records it holds and where their bytes are; built once, checked at every read.

A record is all members whose names agree up to the first dot after the last slash, and it has an image or latents.
Which shards a data set has is in `shard_list.py`.
"""

import contextlib
import hashlib
import json
import os
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sana.data.images import EXTENSIONS, image_size
from sana.data.safe_arrays import npy_shape
from sana.data.sample import BrokenSampleError, DataError
from sana.data.tar_members import BLOCK, parse_header, walk
from sana.utils.logging import get_logger

logger = get_logger(__name__)

FORMAT = 1
CACHE_FOLDER = ".sana-index"
CACHED_FROM = 4 << 20  # bytes; reading a smaller shard's headers takes no longer than reading a file
MAX_SIDE = 1 << 20  # pixels
MAX_JSON_BYTES = 1 << 20
HEADER_BYTES = 1 << 16  # the size of an image is nearly always found in so many bytes
IMAGE_KINDS = tuple(extension[1:] for extension in EXTENSIONS)
KINDS = (*IMAGE_KINDS, "json", "txt", "npy", "npz")
_COUNTED = {"jpg", "jpeg", "png", "json", "npy"}  # a key with two of them is a record to the official tools
Spans = dict[str, tuple[int, int]]  # kind -> (offset, size)


@dataclass(frozen=True)
class ShardIndex:
    """What a shard holds.

    Attributes:
        path: of the shard.
        stamp: (size in bytes, mtime in ns) of the shard when it was read.
        keys: of the records, in the order in which they first occur.
        image_sizes: (N, 2) int32, height and width of each image in pixels; 0 where they could not be found.
        spans: (N, len(KINDS), 2) int64, offset and size of each member; offset 0 where there is none.
        counts: how many records this is by our rule, by the official one, and with every key counted.
    """

    path: Path
    stamp: tuple[int, int]
    keys: tuple[str, ...]
    image_sizes: np.ndarray
    spans: np.ndarray
    counts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def has(self, record: int, kind: str) -> bool:
        """Whether a record has a member of one of `KINDS`."""
        return bool(self.spans[record, KINDS.index(kind), 0])

    def image_kind(self, record: int) -> str | None:
        """The kind of a record's image, the first in the order of `IMAGE_KINDS`; None without image."""
        return next((kind for kind in IMAGE_KINDS if self.has(record, kind)), None)

    def read(self, record: int, kind: str, key: str) -> bytes:
        """Reads a member.

        Args:
            record: its position.
            kind: one of `KINDS`.
            key: name of the record for messages.

        Raises:
            BrokenSampleError: the record has no such member, or the shard is not what it was when it was indexed.
        """
        offset, size = (int(value) for value in self.spans[record, KINDS.index(kind)])
        if not offset:
            raise BrokenSampleError(key, f"{self.path} has no .{kind} for it")
        try:
            with self.path.open("rb") as file:
                there = os.fstat(file.fileno()).st_size
                if there != self.stamp[0]:
                    raise BrokenSampleError(
                        key, f"{self.path} had {self.stamp[0]} bytes when it was indexed and has {there} now"
                    )
                file.seek(offset - BLOCK)
                header, content = file.read(BLOCK), file.read(size)
        except OSError as error:
            raise BrokenSampleError(key, f"{self.path} cannot be read: {error}") from error
        if _declared_size(header) != size or len(content) != size:
            raise BrokenSampleError(key, f"{self.path} does not have its .{kind} where the index says")
        return content


def read_index(path: Path, *, cache_dir: Path | None = None) -> ShardIndex:
    """Returns the index of a shard: the cached one if the shard has not changed since, else a new one.

    Args:
        path: of the tar file.
        cache_dir: where indexes are kept; None: in a hidden folder beside larger shards. Nothing is kept where nothing
            can be written.

    Raises:
        DataError: see `build_index`.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"The shard {path} cannot be read: {error.strerror or error}.") from error
    stamp = (status.st_size, status.st_mtime_ns)
    if cache_dir is None and status.st_size < CACHED_FROM:
        return build_index(path)
    cached = _cache_file(path, cache_dir)
    index = _load(path, stamp, cached)
    if index is None:
        index = build_index(path)
        _store(index, cached)
    return index


def build_index(path: Path) -> ShardIndex:
    """Reads every header of a shard.

    Raises:
        DataError: the shard cannot be read, is cut or damaged, holds what is unsafe, or a member twice.
    """
    members: dict[str, Spans] = {}
    sizes: dict[str, tuple[int, int]] = {}
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            for member, read in walk(file, str(path), total=status.st_size):
                key, kind = split_name(member.name)
                if not key or kind not in KINDS:
                    continue
                record = members.setdefault(key, {})
                if kind in record:
                    raise DataError(f"{path} holds {member.name} twice.")
                record[kind] = (member.offset, member.size)
                if kind == "json" and member.size <= MAX_JSON_BYTES:
                    sizes[key] = _declared_image_size(read())
            records = {key: spans for key, spans in members.items() if any(k in spans for k in (*IMAGE_KINDS, "npy"))}
            found = [sizes.get(key) or (0, 0) for key in records]
            found = [size if all(size) else _image_size(file, spans) for size, spans in zip(found, records.values())]
    except OSError as error:
        raise DataError(f"The shard {path} cannot be read: {error.strerror or error}.") from error
    official = sum(len(_COUNTED & set(spans)) > 1 for spans in members.values())
    return _assemble(path, (status.st_size, status.st_mtime_ns), records, found, (len(records), official, len(members)))


def split_name(name: str) -> tuple[str, str]:
    """Splits a member's name into the record's key and the kind: "a/b.PNG" is ("a/b", "png"); "" hides the member."""
    folder, slash, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    return (f"{folder}{slash}{stem}" if stem else ""), kind.lower()


def _assemble(
    path: Path,
    stamp: tuple[int, int],
    records: Mapping[str, Spans],
    image_sizes: list[tuple[int, int]],
    counts: tuple[int, ...],
) -> ShardIndex:
    spans = np.zeros((len(records), len(KINDS), 2), np.int64)
    for position, members in enumerate(records.values()):
        for kind, span in members.items():
            spans[position, KINDS.index(kind)] = span
    sizes = np.array(image_sizes, np.int32).reshape(len(records), 2)
    return ShardIndex(path, stamp, tuple(records), sizes, spans, counts)


def _declared_size(header: bytes) -> int | None:
    try:
        info = parse_header(header)
    except (tarfile.HeaderError, ValueError):
        return None
    return info.size if info is not None else None


def _declared_image_size(content: bytes) -> tuple[int, int]:
    """Returns height and width from a record's JSON; zeros where they are missing or senseless."""
    try:
        described = json.loads(content)
        height, width = int(described["height"]), int(described["width"])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return 0, 0
    return (height, width) if 0 < height < MAX_SIDE and 0 < width < MAX_SIDE else (0, 0)


def _image_size(file: Any, spans: Spans) -> tuple[int, int]:
    """Returns height and width from the header of a record's image, else of its latents; zeros where unreadable."""
    kind = next((kind for kind in IMAGE_KINDS if kind in spans), "npy")
    offset, size = spans[kind]
    for length in (min(size, HEADER_BYTES), size):
        file.seek(offset)
        content = file.read(length)
        try:
            if kind == "npy":
                height, width = npy_shape(content)[-2:]
                return (height, width) if max(height, width) < MAX_SIDE else (0, 0)
            return image_size(content, kind, max_pixels=1 << 40)
        except (BrokenSampleError, ValueError) as error:
            logger.debug("%s: %s", file.name, error)
    return 0, 0


def _cache_file(path: Path, cache_dir: Path | None) -> Path:
    if cache_dir is None:
        return path.parent / CACHE_FOLDER / f"{path.name}.json"
    folder = hashlib.sha256(str(path.parent.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return cache_dir / folder / f"{path.name}.json"


def _load(path: Path, stamp: tuple[int, int], cached: Path) -> ShardIndex | None:
    """Reads a cached index; None when there is none, or it is of another file or damaged."""
    try:
        content = json.loads(cached.read_bytes())
        if content["format"] != FORMAT or tuple(content["stamp"]) != stamp:
            return None
        records = {
            key: {kind: (int(o), int(s)) for kind, (o, s) in spans.items()} for key, _, spans in content["records"]
        }
        sizes = [(int(height), int(width)) for _, (height, width), _ in content["records"]]
        inside = all(
            kind in KINDS and offset >= BLOCK and size >= 0 and offset + size <= stamp[0]
            for spans in records.values()
            for kind, (offset, size) in spans.items()
        )
        if not inside or len(sizes) != len(records) or any(min(size) < 0 for size in sizes):
            return None
        return _assemble(path, stamp, records, sizes, tuple(int(count) for count in content["counts"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        logger.warning("%s is damaged and will be made anew: %s", cached, error)
        return None


def _store(index: ShardIndex, cached: Path) -> None:
    """Keeps an index, if it can be written; a folder that is only readable is no fault."""
    records = []
    for position, key in enumerate(index.keys):
        members = {
            kind: index.spans[position, KINDS.index(kind)].tolist() for kind in KINDS if index.has(position, kind)
        }
        records.append([key, index.image_sizes[position].tolist(), members])
    content = {"format": FORMAT, "stamp": index.stamp, "counts": index.counts, "records": records}
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cached, json.dumps(content).encode())
    except OSError as error:
        logger.info("the index of %s is not kept: %s", index.path, error)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all; several processes may write the same one.

    Raises:
        OSError: it cannot be written; what was there before is still there.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error matters
            os.unlink(temporary)
        raise
