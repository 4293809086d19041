"""Which captioned images a folder holds: names and paths only. No image and no caption is read here."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sana.data.images import EXTENSIONS
from sana.data.sample import DataError
from sana.utils.logging import get_logger

logger = get_logger(__name__)

META_FILE = "meta_data.json"
NAME_KEYS = ("img", "file_name", "path")  # of a record in meta_data.json
TEXT_SUFFIXES = (".txt", ".TXT")
SHOWN = 5  # names in a log line


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One captioned image of a folder.

    Attributes:
        key: path relative to its data folder, with "/".
        path: of the image file.
        text_suffix: ending of the text file beside it; "" where there is none.
        prompt: caption in `meta_data.json`, which goes before the text file.
    """

    key: str
    path: str
    text_suffix: str = ""
    prompt: str | None = None

    @property
    def stem(self) -> str:
        """Path of the image file without its extension: files beside it start with this."""
        return os.path.splitext(self.path)[0]

    @property
    def name(self) -> str:
        """Name of the image file without folder and extension: what JSON files beside it call it."""
        return os.path.basename(self.stem)


@dataclass
class _Found:
    """What a search came upon: records, images without a caption, captions without an image."""

    records: list[ImageRecord]
    bare_images: list[str]
    bare_captions: list[str]


def find_records(data_dirs: Sequence[str | Path], caption_suffixes: Sequence[str] = ()) -> list[ImageRecord]:
    """Returns the captioned images of folders, in a fixed order: folder by folder, each by path.

    A folder is searched with everything below it (hidden files left out, linked folders followed once) for images of
    the endings `EXTENSIONS` in any case, each with a text file `name.txt` or a caption file `name<suffix>.json`.

    Where a folder holds `meta_data.json`, it alone says which images there are, and in which order. It is the official
    `{"img_names": ["a.png", ...]}`, or a list of names or of records, or `{"img_names": [records]}`, or a mapping from
    names to records or captions. A record names its image in `img`, `file_name` or `path`, relative to the folder, and
    may hold its caption as `prompt`.

    An image without a caption and a caption without an image are left out, with one log line for each of the two.

    Args:
        data_dirs: folders. A key that an earlier folder has too gets the folder's number in front: "1:a.png".
        caption_suffixes: endings of the JSON files with captions, without ".json".

    Raises:
        DataError: a folder or `meta_data.json` cannot be read, or there is no captioned image.
    """
    found = _Found([], [], [])
    taken: set[str] = set()
    for number, folder in enumerate(data_dirs):
        top = os.path.expanduser(folder)
        if not os.path.isdir(top):
            raise DataError(f"data_dir {top} {'is not a folder' if os.path.exists(top) else 'does not exist'}.")
        before = len(found.records)
        listed = os.path.isfile(os.path.join(top, META_FILE))
        (_search_listed if listed else _search_tree)(top, tuple(caption_suffixes), found)
        for index in range(before, len(found.records)):
            record = found.records[index]
            if record.key in taken:
                found.records[index] = replace(record, key=f"{number}:{record.key}")
            taken.add(found.records[index].key)
    _report(found)
    if not found.records:
        raise DataError(
            f"No captioned image in {', '.join(map(str, data_dirs)) or 'data_dir, which is empty'}: put name.txt "
            f"beside every name.png, .jpg, .jpeg or .webp ({len(found.bare_images)} images without a caption, "
            f"{len(found.bare_captions)} captions without an image)."
        )
    return found.records


def _report(found: _Found) -> None:
    for names, what in (
        (found.bare_images, "images have no caption"),
        (found.bare_captions, "captions have no image"),
    ):
        if names:
            more = ", ..." if len(names) > SHOWN else ""
            logger.warning("%d %s and are left out: %s%s", len(names), what, ", ".join(names[:SHOWN]), more)


def _search_tree(top: str, caption_suffixes: Sequence[str], found: _Found) -> None:
    for folder, files in _folders(top):
        relative = os.path.relpath(folder, top)
        prefix = "" if relative == "." else relative.replace(os.sep, "/") + "/"
        images, texts = [], {}
        for file in files:
            stem, extension = os.path.splitext(file)
            if extension.lower() in EXTENSIONS:
                images.append((stem, file))
            elif extension.lower() == ".txt":
                texts[stem] = extension
        present = set(files) if caption_suffixes else set()
        for stem, file in images:
            if stem in texts or any(f"{stem}{suffix}.json" in present for suffix in caption_suffixes):
                path = os.path.join(folder, file)
                found.records.append(ImageRecord(prefix + file, path, texts.get(stem, "")))
            else:
                found.bare_images.append(prefix + file)
        stems = {stem for stem, _ in images}
        found.bare_captions += [f"{prefix}{stem}{ending}" for stem, ending in texts.items() if stem not in stems]


def _folders(top: str) -> Iterator[tuple[str, list[str]]]:
    """Yields every folder from `top` on, sorted, with its files, sorted; links are followed, but never in circles."""

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}.") from error

    seen: set[str] = set()
    for folder, subfolders, files in os.walk(top, followlinks=True, onerror=fail):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield folder, sorted(name for name in files if not name.startswith("."))


def _search_listed(top: str, caption_suffixes: Sequence[str], found: _Found) -> None:
    for name, prompt in _listed(os.path.join(top, META_FILE)):
        key = os.path.normpath(os.path.relpath(name, top) if os.path.isabs(name) else name).replace(os.sep, "/")
        if key == ".." or key.startswith("../"):
            raise DataError(f"{os.path.join(top, META_FILE)} lists {name!r}, which lies outside the folder.")
        path = os.path.join(top, key)
        stem = os.path.splitext(path)[0]
        text_suffix = next((suffix for suffix in TEXT_SUFFIXES if os.path.isfile(stem + suffix)), "")
        if not os.path.isfile(path):
            found.bare_captions.append(f"{key} ({META_FILE})")
        elif prompt or text_suffix or any(os.path.isfile(f"{stem}{suffix}.json") for suffix in caption_suffixes):
            found.records.append(ImageRecord(key, path, text_suffix, prompt))
        else:
            found.bare_images.append(key)


def _listed(path: str) -> Iterator[tuple[str, str | None]]:
    """Yields (image name, caption) of a `meta_data.json`; its forms are described at `find_records`."""
    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not readable JSON: {error}; repair or remove it.") from error
    entries: Any = content.get("img_names", content) if isinstance(content, dict) else content
    if isinstance(entries, dict):
        entries = [
            {NAME_KEYS[0]: name} | (entry if isinstance(entry, dict) else {"prompt": entry})
            for name, entry in entries.items()
        ]
    seen: set[str] = set()
    for entry in entries if isinstance(entries, list) else [entries]:
        record = {NAME_KEYS[0]: entry} if isinstance(entry, str) else entry
        named = isinstance(record, dict) and next((record[key] for key in NAME_KEYS if key in record), None)
        if not named or not isinstance(named, str):
            raise DataError(f"{path}: {entry!r:.200} names no image; it needs one of {', '.join(NAME_KEYS)}.")
        prompt = record.get("prompt")
        if not isinstance(prompt, str | None):
            raise DataError(f"{path}: the prompt of {named!r} is {prompt!r:.200}, not a text.")
        if named not in seen:
            seen.add(named)
            yield named, prompt.strip() if prompt else None
