"""Looks through a data set for what would spoil a training run, and reports it; nothing is changed or left out.

What lies where is found by `scan.py`; the command is `tools/data_check.py`.
"""

import hashlib
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from sana.data.aspect_ratio import ASPECT_RATIOS, closest_ratio
from sana.data.images import MAX_PIXELS, read_image
from sana.data.sample import BrokenSampleError
from sana.data.scan import Found

KINDS = {  # kind of problem -> what it means
    "unreadable": "images or shards that cannot be read",
    "no_caption": "images without a caption",
    "no_image": "captions without an image",
    "damaged_side_file": "caption files that cannot be used",
    "duplicate": "images that are the same file as another",
    "starved_bucket": "buckets with fewer images than a batch",
    "long_caption": "captions longer than the text encoder reads",
}
WINDOW = 64  # images in memory at a time


@dataclass(frozen=True)
class CheckOptions:
    """What counts as a problem.

    Attributes:
        image_size: side of the images that training wants, in pixels.
        aspect_ratio_type: table of `ASPECT_RATIOS` whose buckets are counted; None: all images are square.
        batch_size: a bucket with fewer images is starved.
        caption_excess: words for what is too long about a caption, "" when it is not.
        max_pixels: an image with more is unreadable.
        threads: that decode images.
    """

    image_size: int = 512
    aspect_ratio_type: str | None = None
    batch_size: int = 1
    caption_excess: Callable[[str], str] | None = None
    max_pixels: int = MAX_PIXELS
    threads: int = 4


@dataclass
class Report:
    """What was found.

    Attributes:
        images: number of image files.
        captions: number of captions of images.
        problems: kind of `KINDS` -> list of {"key": where, "detail": what}.
        buckets: bucket -> number of readable images with a caption.
        sides: (height, width) in pixels of the readable images.
        smaller: how many of them training would enlarge.
    """

    images: int = 0
    captions: int = 0
    problems: dict[str, list[dict[str, str]]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    buckets: Counter[str] = field(default_factory=Counter)
    sides: list[tuple[int, int]] = field(default_factory=list)
    smaller: int = 0

    @property
    def clean(self) -> bool:
        """Whether there is something, and nothing is wrong with it."""
        return self.images > 0 and not any(self.problems.values())

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        return {
            "clean": self.clean,
            "images": self.images,
            "captions": self.captions,
            "problems": self.problems,
            "buckets": dict(sorted(self.buckets.items(), key=lambda pair: float(pair[0]))),
            "sizes": self._sizes() | {"smaller_than_wanted": self.smaller},
        }

    def _sizes(self) -> dict[str, Any]:
        if not self.sides:
            return {}
        found = {"height": [height for height, _ in self.sides], "width": [width for _, width in self.sides]}
        return {
            side: {"min": min(values), "median": statistics.median(values), "max": max(values)}
            for side, values in found.items()
        }


def check_data(found: Iterable[Found], options: CheckOptions) -> Report:
    """Reads and decodes every image once.

    Args:
        found: from `scan`.
        options: see `CheckOptions`.
    """
    report, first_of = Report(), {}
    with ThreadPoolExecutor(options.threads) as threads:
        for window in _windows(found):
            looked = threads.map(lambda item: _look(item, options), window)
            for item, (digest, size, fault) in zip(window, looked, strict=True):
                _note_captions(report, item, options)
                if item.read is None:
                    continue
                if digest:
                    first = first_of.setdefault(digest, item.key)
                    if first != item.key:
                        _note(report, "duplicate", item.key, f"the same file as {first}")
                if size is None:
                    _note(report, "unreadable", item.key, fault)
                else:
                    _note_size(report, item, size, options)
    for bucket, count in sorted(report.buckets.items(), key=lambda pair: float(pair[0])):
        if count < options.batch_size:
            _note(report, "starved_bucket", bucket, f"{count} images, and a batch has {options.batch_size}")
    return report


def word_limit(words: int) -> Callable[[str], str]:
    """A `caption_excess` that counts words."""

    def excess(caption: str) -> str:
        count = len(caption.split())
        return f"{count} words, more than {words}" if count > words else ""

    return excess


def _look(item: Found, options: CheckOptions) -> tuple[bytes, tuple[int, int] | None, str]:
    """Returns the content hash of an image, its (height, width), and why it cannot be read."""
    if item.read is None:
        return b"", None, ""
    try:
        content = item.read()
    except BrokenSampleError as error:
        return b"", None, error.reason
    digest = hashlib.sha256(content).digest()
    try:
        picture = read_image(content, item.key, max_pixels=options.max_pixels)
    except BrokenSampleError as error:
        return digest, None, error.reason
    return digest, (picture.height, picture.width), ""


def _note_captions(report: Report, item: Found, options: CheckOptions) -> None:
    shard_fault = item.read is None and not item.captions
    for problem in item.problems:
        _note(report, "unreadable" if shard_fault else "damaged_side_file", item.key, problem)
    if item.read is None:
        if item.captions:
            _note(report, "no_image", item.key, f"there is no image {item.name}")
        return
    report.images += 1
    report.captions += len(item.captions)
    if not item.captions:
        _note(report, "no_caption", item.key, "neither a text nor a caption file has a caption for it")
    for captioner, caption in item.captions.items():
        if options.caption_excess is not None and (excess := options.caption_excess(caption)):
            _note(report, "long_caption", item.key, f"{captioner}: {excess}")


def _note_size(report: Report, item: Found, size: tuple[int, int], options: CheckOptions) -> None:
    report.sides.append(size)
    wanted, bucket = (options.image_size, options.image_size), "1.0"
    if options.aspect_ratio_type is not None:
        table = ASPECT_RATIOS[options.aspect_ratio_type]
        bucket = closest_ratio(*size, table)
        wanted = table[bucket]
    report.smaller += size[0] < wanted[0] or size[1] < wanted[1]
    if item.captions:
        report.buckets[bucket] += 1


def _note(report: Report, kind: str, key: str, detail: str) -> None:
    report.problems[kind].append({"key": key, "detail": detail})


def _windows(found: Iterable[Found]) -> Iterator[list[Found]]:
    items = iter(found)
    while window := list(islice(items, WINDOW)):
        yield window
