"""Sizes of the images of folders, read from their headers once: an index in each folder remembers them.

An entry holds for a file of the same name, bytes and time of the last change; any other is read anew. Indexes of tar
shards are in `shard_index.py`.
"""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sana.data.image_records import ImageRecord
from sana.data.images import image_size
from sana.data.sample import BrokenSampleError
from sana.data.shard_index import CACHE_FOLDER, write_atomically
from sana.utils.logging import get_logger

logger = get_logger(__name__)

INDEX_NAME = "image_sizes.json"
FORMAT = 1
KEPT_FROM = 256  # images; the headers of fewer are read in no time
HEADER_THREADS = 8  # for folders on a network
HEADERS_AT_ONCE = 4096
Size = tuple[int, int]  # (height, width) in pixels of the upright image
Entry = tuple[int, int, int, int]  # bytes and mtime_ns of the file, height, width


def image_sizes(
    folders: Sequence[str | Path], records: Sequence[ImageRecord], *, max_pixels: int
) -> list[Size | BrokenSampleError]:
    """Returns (height, width) of every image, or why its header cannot be read, in the order of the records.

    Only headers of images that the folders' indexes do not know are read. What was read is kept where a folder of at
    least `KEPT_FROM` images can be written.

    Args:
        folders: the data folders that the records were found in.
        records: of `find_records`.
        max_pixels: a larger image is broken.
    """
    sizes: dict[str, Size | BrokenSampleError] = {}
    rest = list({record.path: record for record in records}.values())  # a file may be found from two folders
    for folder in sorted({os.path.join(os.path.expanduser(folder), "") for folder in folders}, key=len, reverse=True):
        mine = [record for record in rest if record.path.startswith(folder)]
        rest = [record for record in rest if not record.path.startswith(folder)]
        sizes |= _of_folder(Path(folder), [(record.path[len(folder) :], record) for record in mine], max_pixels)
    sizes |= {path: size for path, size, _ in _each(rest, lambda record: _read(record, None, max_pixels))}
    return [sizes[record.path] for record in records]


def _of_folder(
    folder: Path, named: list[tuple[str, ImageRecord]], max_pixels: int
) -> dict[str, Size | BrokenSampleError]:
    index = folder / CACHE_FOLDER / INDEX_NAME
    known = _load(index) if len(named) >= KEPT_FROM else {}
    names = {record.path: name for name, record in named}
    found = _each(
        [record for _, record in named], lambda record: _read(record, known.get(names[record.path]), max_pixels)
    )
    kept = {names[path]: entry for path, _, entry in found if entry is not None}
    if len(named) >= KEPT_FROM and kept != known:
        _store(index, kept)
    return {path: size for path, size, _ in found}


Found = tuple[str, Size | BrokenSampleError, Entry | None]


def _each(records: Sequence[ImageRecord], read: Callable[[ImageRecord], Found]) -> list[Found]:
    found: list[Found] = []
    with ThreadPoolExecutor(HEADER_THREADS) as threads:
        for start in range(0, len(records), HEADERS_AT_ONCE):
            found += threads.map(read, records[start : start + HEADERS_AT_ONCE])
    return found


def _read(record: ImageRecord, known: Entry | None, max_pixels: int) -> Found:
    """The path of a record with its size and what an index keeps of it; None for a file that is broken."""
    try:
        status = os.stat(record.path)  # before the header: a file that changes meanwhile is read anew next time
        stamp = (status.st_size, status.st_mtime_ns)
    except OSError:
        stamp = (-1, -1)  # the header says what is wrong
    if known is not None and known[:2] == stamp and known[2] * known[3] <= max_pixels:
        return record.path, known[2:], known
    try:
        height, width = image_size(record.path, record.key, max_pixels=max_pixels)
    except BrokenSampleError as error:
        return record.path, error, None
    return record.path, (height, width), (*stamp, height, width)


def _load(index: Path) -> dict[str, Entry]:
    """Reads an index; empty when there is none, or it is damaged."""
    try:
        content = json.loads(index.read_bytes())
        if content["format"] != FORMAT:
            return {}
        return {name: _entry(values) for name, values in content["sizes"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        logger.warning("%s is damaged and will be made anew: %s", index, error)
        return {}


def _entry(values: Any) -> Entry:
    size, changed, height, width = values
    if not all(type(value) is int for value in values) or height < 1 or width < 1:
        raise ValueError(f"entry {values!r}")
    return size, changed, height, width


def _store(index: Path, sizes: dict[str, Entry]) -> None:
    """Keeps an index, if it can be written; a folder that is only readable is no fault."""
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(index, json.dumps({"format": FORMAT, "sizes": sizes}).encode())
    except OSError as error:
        logger.info("the sizes of the images of %s are not kept: %s", index.parent.parent, error)
