"""Walking over images and captions as they lie in folders and tar shards, damaged ones included.

Data sets for training leave out or refuse what is wrong; here everything is shown, for the tools that check data and
write captions. Nothing is decoded and nothing is written.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sana.data.captions import PROMPT, caption_of_text, captions_of_json
from sana.data.images import EXTENSIONS
from sana.data.sample import BrokenSampleError, DataError
from sana.data.shard_index import ShardIndex, split_name
from sana.data.shard_list import list_shards, open_shards
from sana.data.tar_members import walk

SCORE_ENDING = "_clip_score.json"
META_FILES = ("meta_data.json", "wids-meta.json")


@dataclass(frozen=True)
class Found:
    """An image with what is said about it, or one of the two without the other.

    Attributes:
        key: its place, for messages and reports: a path, or shard and record.
        name: what the JSON files beside it call it.
        side_stem: those files are named `<side_stem>_<captioner>.json`.
        captions: {captioner: text}; the text file's, or the record's own, is "prompt".
        endings: captioner -> the ending of its file, such as "_VILA1-5-13B"; of "prompt" it is "_prompt".
        read: gives the bytes of the image file, or raises a BrokenSampleError; None where there is no image.
        problems: sentences about files beside it that cannot be used.
    """

    key: str
    name: str
    side_stem: str
    captions: dict[str, str] = field(default_factory=dict)
    endings: dict[str, str] = field(default_factory=dict)
    read: Callable[[], bytes] | None = None
    problems: tuple[str, ...] = ()


def scan(places: Sequence[str | Path], *, kind: str | None = None) -> Iterator[Found]:
    """Yields every image and every lonely caption below folders, and in tar shards.

    Args:
        places: folders, `.tar` files or `wids-meta.json`.
        kind: "folder" or "shards"; None: a folder with tar files, and what is no folder, holds shards.

    Raises:
        DataError: a place does not exist, or cannot be listed. A damaged shard is a `Found` with a problem.
    """
    for place in places:
        path = Path(place).expanduser()
        if not path.exists():
            raise DataError(f"{path} does not exist.")
        if (kind or ("shards" if _has_shards(path) else "folder")) == "folder":
            if not path.is_dir():
                raise DataError(f"{path} is not a folder of images.")
            yield from _scan_folder(path)
        else:
            yield from _scan_shards(path)


def _has_shards(path: Path) -> bool:
    return not path.is_dir() or (path / META_FILES[1]).is_file() or any(path.rglob("*.tar"))


def _scan_folder(top: Path) -> Iterator[Found]:
    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}.") from error

    for folder, subfolders, names in os.walk(top, onerror=fail):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from _scan_files(top, Path(folder), sorted(name for name in names if not name.startswith(".")))


def _scan_files(top: Path, folder: Path, names: Sequence[str]) -> Iterator[Found]:
    """Yields the images of one folder, then its captions without an image."""
    images = [name for name in names if os.path.splitext(name)[1].lower() in EXTENSIONS]
    texts = {os.path.splitext(name)[0]: name for name in names if name.lower().endswith(".txt")}
    stems = {os.path.splitext(name)[0] for name in images}
    beside: dict[str, list[str]] = {}  # image name -> its JSON files
    lonely = [(name, stem) for stem, name in texts.items() if stem not in stems]
    for name in names:
        if name.lower().endswith(".json") and not name.endswith(SCORE_ENDING) and name not in META_FILES:
            owner = _owner(name, stems)
            if owner:
                beside.setdefault(owner, []).append(name)
            elif isinstance(owner_name := _only_key(folder / name), str):
                lonely.append((name, owner_name))
    for image in images:
        stem = os.path.splitext(image)[0]
        captions, endings, problems = _captions_beside(folder, stem, texts.get(stem), beside.get(stem, []))
        path = folder / image
        key = path.relative_to(top).as_posix()
        yield Found(key, stem, str(folder / stem), captions, endings, _file_reader(path, key), tuple(problems))
    for name, stem in lonely:
        yield Found((folder / name).relative_to(top).as_posix(), stem, str(folder / stem), {PROMPT: name})


def _owner(name: str, stems: set[str]) -> str:
    """The image that `<image>_<captioner>.json` is about: the longest name before an underscore; "" for none."""
    parts = name.rsplit(".", 1)[0].split("_")
    before = ("_".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))
    return next((stem for stem in before if stem in stems), "")


def _only_key(path: Path) -> str | None:
    """The one image that a captioner's file speaks of; None when it is no such file."""
    content = _json(path)
    if isinstance(content, dict) and len(content) == 1:
        name, entry = next(iter(content.items()))
        return name if isinstance(entry, dict) and path.name.startswith(f"{name}_") else None
    return None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _captions_beside(
    folder: Path, stem: str, text: str | None, files: Sequence[str]
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    captions: dict[str, str] = {}
    endings: dict[str, str] = {}
    problems: list[str] = []
    if text is not None:
        try:
            prompt = caption_of_text((folder / text).read_text(encoding="utf-8"))
            captions |= {PROMPT: prompt} if prompt else {}
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{text} cannot be read: {error}")
    for file in files:
        content = _json(folder / file)
        if content is None:
            problems.append(f"{file} is not readable JSON")
            continue
        try:
            found = captions_of_json(content, stem)
        except ValueError as error:
            problems.append(f"{file}: {error}")
            continue
        captions |= found
        endings |= dict.fromkeys(found, file.removeprefix(stem)[: -len(".json")])
    return captions, {PROMPT: "_prompt"} | endings, problems


def _file_reader(path: Path, key: str) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise BrokenSampleError(key, f"{path} cannot be read: {error}") from error

    return read


def _scan_shards(place: Path) -> Iterator[Found]:
    for entry in list_shards(str(place)):
        try:
            [(_, index)] = open_shards([entry])
        except DataError as error:
            yield Found(entry.name, entry.name, entry.location.removesuffix(".tar"), problems=(str(error),))
            continue
        yield from _scan_shard(entry.name, index)


def _scan_shard(shard: str, index: ShardIndex) -> Iterator[Found]:
    stem = str(index.path).removesuffix(".tar")
    beside: dict[str, dict[str, str]] = {}
    endings = {PROMPT: "_prompt"}
    problems: list[str] = []
    for file in sorted(index.path.parent.glob(f"{index.path.stem}_*.json")):
        if not file.name.endswith(SCORE_ENDING):
            content = _json(file)
            if not isinstance(content, dict):
                problems.append(f"{file.name} is not readable JSON")
                continue
            for name in content:
                try:
                    captions = captions_of_json(content, name)
                except ValueError as error:
                    problems.append(f"{file.name}: {error}")
                    continue
                beside.setdefault(name, {}).update(captions)
                endings |= dict.fromkeys(captions, file.stem.removeprefix(index.path.stem))
    for position, name in enumerate(index.keys):
        key = f"{shard}/{name}"
        image = index.image_kind(position)
        own, own_problems = _own_captions(index, position, key)
        read = (lambda position=position, image=image, key=key: index.read(position, image, key)) if image else None
        if image or not index.has(position, "npy"):  # latents without an image are no fault
            captions = own | beside.get(name, {})
            yield Found(key, name, stem, captions, endings, read, (*problems, *own_problems))
        problems = []
    yield from _lonely_members(shard, index, stem)
    for name in beside.keys() - set(index.keys):
        yield Found(f"{shard}/{name}", name, stem, beside[name])


def _own_captions(index: ShardIndex, position: int, key: str) -> tuple[dict[str, str], list[str]]:
    """The captions inside a record: `prompt` of its JSON, else its text."""
    try:
        if index.has(position, "json"):
            content = json.loads(index.read(position, "json", key))
            prompt = content.get(PROMPT) if isinstance(content, dict) else None
            if isinstance(prompt, str) and prompt.strip():
                return {PROMPT: prompt}, []
        if index.has(position, "txt"):
            text = caption_of_text(index.read(position, "txt", key).decode())
            return ({PROMPT: text} if text else {}), []
    except (BrokenSampleError, ValueError, RecursionError) as error:
        return {}, [f"its caption cannot be read: {error}"]
    return {}, []


def _lonely_members(shard: str, index: ShardIndex, stem: str) -> Iterator[Found]:
    names: dict[str, None] = {}
    with index.path.open("rb") as file:
        for member, _ in walk(file, str(index.path), total=index.stamp[0]):
            name, kind = split_name(member.name)
            if kind in ("json", "txt") and name:
                names[name] = None
    for name in names.keys() - set(index.keys):
        yield Found(f"{shard}/{name}", name, stem, {PROMPT: name})
