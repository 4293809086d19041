"""Filling the JSON files beside images and shards, `{name: {captioner: value}}`, with what a model says about images.

Which images there are is found by `scan.py`. No model is known here: a callable is given.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sana.data.images import MAX_PIXELS, read_image
from sana.data.sample import BrokenSampleError, DataError
from sana.data.scan import Found
from sana.data.shard_index import write_atomically
from sana.utils.distributed import rank, world_size
from sana.utils.logging import get_logger

logger = get_logger(__name__)

SAVE_EVERY = 256  # entries of a file that many images share

# What is wanted of an image: {ending of the file: {entry: text that the model gets}}.
Wanted = dict[str, dict[str, str]]
# (images, their texts) -> for each image a value for each of its texts.
Compute = Callable[[Sequence[Image.Image], Sequence[Sequence[str]]], Sequence[Sequence[str]]]


@dataclass
class FillSummary:
    """Images for which something was computed, that had everything, and that cannot be read."""

    written: int = 0
    present: int = 0
    broken: int = 0


def fill_side_files(
    found: Iterable[Found],
    wanted: Callable[[Found], Wanted],
    compute: Compute,
    *,
    batch_size: int = 8,
    overwrite: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> FillSummary:
    """Computes the entries that are missing; what else stands in a file stays. Files appear whole or not at all.

    May be killed at any time and run again. Of several processes each takes its share of the files.

    Args:
        found: from `scan`.
        wanted: what an image should have; an empty dict leaves it out.
        compute: see `Compute`.
        batch_size: images given to `compute` at once.
        overwrite: compute entries that are there, too.
        max_pixels: of an image that is read.

    Raises:
        DataError: a file that is to be filled is damaged.
        OSError: one cannot be written.
    """
    summary, files = FillSummary(), _Files()
    batch: list[tuple[Found, Image.Image, Wanted]] = []

    def run() -> None:
        texts = [[text for entries in missing.values() for text in entries.values()] for _, _, missing in batch]
        for (item, _, missing), values in zip(batch, compute([image for _, image, _ in batch], texts), strict=True):
            names = [(ending, entry) for ending, entries in missing.items() for entry in entries]
            for (ending, entry), value in zip(names, values, strict=True):
                files.put(item, ending, entry, value)
            summary.written += 1
        files.save(keep=batch[-1][0].side_stem)
        batch.clear()

    for item in found:
        if item.read is None or zlib.crc32(item.side_stem.encode("utf-8", "surrogateescape")) % world_size() != rank():
            continue
        missing = {ending: files.missing(item, ending, entries, overwrite) for ending, entries in wanted(item).items()}
        missing = {ending: entries for ending, entries in missing.items() if entries}
        if not missing:
            summary.present += 1
            continue
        try:
            batch.append((item, read_image(item.read(), item.key, max_pixels=max_pixels), missing))
        except BrokenSampleError as error:
            logger.warning("skipped: %s", error)
            summary.broken += 1
            continue
        if len(batch) >= batch_size:
            run()
    if batch:
        run()
    files.save()
    return summary


class _Files:
    """The contents of files that are being filled."""

    def __init__(self) -> None:
        self.stem = ""
        self.contents: dict[Path, dict[str, Any]] = {}
        self.unsaved: dict[Path, int] = {}

    def missing(self, item: Found, ending: str, entries: dict[str, str], overwrite: bool) -> dict[str, str]:
        """The entries that the file does not have for this image."""
        if overwrite:
            return entries
        known = self._content(item, ending).get(item.name, {})
        return {entry: text for entry, text in entries.items() if entry not in known}

    def put(self, item: Found, ending: str, entry: str, value: str) -> None:
        path = _path(item, ending)
        self._content(item, ending).setdefault(item.name, {})[entry] = value
        self.unsaved[path] = self.unsaved.get(path, 0) + 1

    def save(self, keep: str | None = None) -> None:
        """Writes what changed; files of the stem `keep` are still being filled and wait for more."""
        waiting = () if keep is None else (path for path in self.unsaved if str(path).startswith(f"{keep}_"))
        later = {path for path in waiting if self.unsaved[path] < SAVE_EVERY}
        for path in [path for path in self.unsaved if path not in later]:
            text = json.dumps(self.contents[path], ensure_ascii=False)
            write_atomically(path, text.encode("utf-8", "surrogateescape"))
            del self.unsaved[path]
        self.contents = {path: self.contents[path] for path in self.contents if path in later}

    def _content(self, item: Found, ending: str) -> dict[str, Any]:
        path = _path(item, ending)
        if path not in self.contents:
            if item.side_stem != self.stem:  # of files that were only looked at, one group is remembered
                self.stem = item.side_stem
                self.contents = {known: self.contents[known] for known in self.contents if known in self.unsaved}
            self.contents[path] = _read(path)
        return self.contents[path]


def _path(item: Found, ending: str) -> Path:
    return Path(f"{item.side_stem}{ending}.json")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not readable JSON ({error}): repair or remove it.") from error
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise DataError(f"{path} does not map image names to captioners: rename or remove it.")
    return content
