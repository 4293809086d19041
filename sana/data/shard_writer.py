"""Packing a folder of captioned images into tar shards, which `webdataset.py` reads.

The same folder gives the same bytes. A shard is there whole or not at all, and `wids-meta.json` comes last: a run that
was killed is taken up by running it again. Which images a folder has is in `image_records.py`.
"""

import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sana.data.captions import PROMPT, captions_of_json, prompt_of, read_json, scores_of_json
from sana.data.image_records import ImageRecord, find_records
from sana.data.images import image_size
from sana.data.sample import BrokenSampleError, DataError
from sana.data.shard_index import write_atomically
from sana.data.shard_list import META_FILE, wids_meta
from sana.data.tar_members import BLOCK, MAX_MEMBER_BYTES, walk

SCORE_ENDING = "_clip_score"  # of the suffix of a file with scores
OURS = re.compile(r"\d{8}(\.tar|_.*\.json)")
MAX_KEY_BYTES = 80  # the name of a member must fit into 100
FEATURES = (".npy", ".npz")  # copied when they stand beside an image
Side = dict[str, str] | dict[str, float]


@dataclass(frozen=True)
class PackedRecord:
    """One image on its way into a shard.

    Attributes:
        key: unique in the data set, without dots and slashes.
        members: (name, content), or (name, path) of a file that is copied; with its size.
        side: suffix -> {captioner: caption or score}.
    """

    key: str
    members: tuple[tuple[str, bytes | Path, int], ...]
    side: dict[str, Side]

    @property
    def tar_bytes(self) -> int:
        """What it takes in a tar. Names are kept so short that no member needs an extended header."""
        return sum(BLOCK + -(-size // BLOCK) * BLOCK for _, _, size in self.members)


@dataclass
class PackSummary:
    """What `pack_folder` did.

    Attributes:
        records: in all shards.
        shards: number of them.
        kept: shards that were there already.
        broken: images that were left out, with the reason.
    """

    records: int = 0
    shards: int = 0
    kept: int = 0
    broken: list[str] = field(default_factory=list)


def pack_folder(
    source: str | Path,
    output: str | Path,
    *,
    shard_size: int = 10_000,
    max_bytes: int = 1 << 30,
    caption_lines: str = "all",
    overwrite: bool = False,
    skip_broken: bool = False,
    on_start: Callable[[int], None] | None = None,
    on_record: Callable[[], None] | None = None,
) -> PackSummary:
    """Packs every captioned image of a folder.

    Each record is `key.json` (file_name, prompt, width, height), `key.<image>`, and `key.npy`, `key.npz` if they stand
    beside the image. Captions and scores of `name_<VLM>.json`, `name_<VLM>_clip_score.json` go to `<shard>_<VLM>.json`.

    Args:
        source: see `find_records`.
        output: made when needed. Shards that a killed run left there are kept if they hold exactly what belongs there.
        shard_size: most records in a shard.
        max_bytes: most bytes in a shard; one record alone may be larger.
        caption_lines: of a text file: "all", as officially, or "first".
        overwrite: remove other shards from the output first.
        skip_broken: leave unreadable images out instead of stopping at the first.
        on_start: called with the number of images.
        on_record: called after every image.

    Raises:
        DataError: no captioned image, an unreadable one, or the output holds other shards.
        OSError: a file cannot be written; finished shards stay.
        ValueError: a limit that allows nothing.
    """
    if shard_size < 1 or max_bytes < 1:
        raise ValueError(f"shard_size and max_bytes must be at least 1, not {shard_size} and {max_bytes}.")
    source, output = Path(source).expanduser(), Path(output).expanduser()
    if not source.is_dir():
        raise DataError(f"There is no folder {source}.")
    if source.resolve() == output.resolve():
        raise DataError(f"The output {output} is the input folder itself: name another one.")
    suffixes = find_suffixes(source)
    records = find_records([source], [suffix for suffix in suffixes if not suffix.endswith(SCORE_ENDING)])
    if on_start is not None:
        on_start(len(records))
    output.mkdir(parents=True, exist_ok=True)
    _clear(output, everything=overwrite)
    summary = PackSummary()
    packed = _packed(records, suffixes, caption_lines, summary.broken if skip_broken else None, on_record)
    listed, written = [], {META_FILE}
    for shard in _shards(packed, shard_size, max_bytes):
        name = f"{summary.shards:08d}"
        written.update(_side_files(name, shard), [f"{name}.tar"])
        summary.kept += _finish_shard(output, name, shard)
        summary.shards += 1
        summary.records += len(shard)
        listed.append((f"{name}.tar", len(shard), (output / f"{name}.tar").stat().st_size))
    if not listed:
        raise DataError(f"None of the {len(records)} images in {source} can be read; the first: {summary.broken[0]}.")
    names = {path.name for path in output.iterdir() if path.suffix == ".tar" or OURS.fullmatch(path.name)}
    if foreign := sorted(names - written):
        raise _occupied(output / foreign[0])
    _write_changed(output / META_FILE, wids_meta(listed))
    return summary


def find_suffixes(source: Path) -> list[str]:
    """Returns the endings of JSON files that belong to images of a folder, such as "_VILA1-5-13B", sorted.

    `a_b_VILA.json` belongs to `a_b.png` if there is one, else to `a.png`.
    """
    suffixes: set[str] = set()
    seen: set[str] = set()  # linked folders may lead back
    for folder, folders, files in os.walk(source, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [name for name in folders if not name.startswith(".") and real not in seen]
        seen.add(real)
        stems = {os.path.splitext(name)[0] for name in files if not name.endswith(".json")}
        for name in files:
            if name.endswith(".json") and not name.startswith("."):
                stem = name.removesuffix(".json")
                ends = [position for position, sign in enumerate(stem) if sign == "_" and stem[:position] in stems]
                suffixes |= {stem[ends[-1] :]} if ends else set()
    return sorted(suffixes)


def unique_keys(records: Sequence[ImageRecord]) -> list[str]:
    """Returns a key for every image: its name, with its folders before it where several have one name.

    Dots and slashes would end a key, so they are written as "_" and "__"; what is still equal is numbered.
    """

    def clean(text: str) -> str:
        kept = "".join(sign if sign.isalnum() or sign in "-_ +,=@()" else "_" for sign in text.replace("/", "__"))
        return kept.encode()[:MAX_KEY_BYTES].decode("utf-8", "ignore")

    names = [clean(record.name) for record in records]
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    keys, taken = [], {name for name, count in counts.items() if count == 1}
    for name, record in zip(names, records, strict=True):
        if counts[name] > 1:
            base = clean(os.path.splitext(record.key)[0])
            name, number = base, 1
            while name in taken:
                number += 1
                name = f"{base}-{number}"
            taken.add(name)
        keys.append(name)
    return keys


def _packed(
    records: Sequence[ImageRecord],
    suffixes: Sequence[str],
    caption_lines: str,
    broken: list[str] | None,
    on_record: Callable[[], None] | None,
) -> Iterator[PackedRecord]:
    for key, record in zip(unique_keys(records), records, strict=True):
        try:
            yield _pack(key, record, suffixes, caption_lines)
        except BrokenSampleError as error:
            if broken is None:
                raise DataError(
                    f"{record.path} cannot be packed ({error.reason}): repair or remove it, or skip it."
                ) from error
            broken.append(str(error))
        if on_record is not None:
            on_record()


def _pack(key: str, record: ImageRecord, suffixes: Sequence[str], caption_lines: str) -> PackedRecord:
    height, width = image_size(record.path, record.key)
    extension = os.path.splitext(record.path)[1].lower()
    side: dict[str, Side] = {}
    for suffix in suffixes:
        path = f"{record.stem}{suffix}.json"
        content = read_json(path, record.key)
        entry: Side
        try:
            if suffix.endswith(SCORE_ENDING):
                entry = dict(scores_of_json(content, record.name))
            else:
                entry = captions_of_json(content, record.name)
        except ValueError as error:
            raise BrokenSampleError(record.key, f"{path}: {error}") from error
        side |= {suffix: entry} if entry else {}
    prompt = prompt_of(record, caption_lines)
    described = {
        "file_name": f"{key}{extension}",
        **({PROMPT: prompt} if prompt else {}),
        "width": width,
        "height": height,
    }
    text = (json.dumps(described, indent=4, ensure_ascii=False) + "\n").encode("utf-8", "replace")
    files = [(f"{key}{extension}", Path(record.path))]
    beside = [(ending, Path(record.stem + ending)) for ending in FEATURES]
    files += [(f"{key}{ending}", path) for ending, path in beside if path.is_file()]
    copied = [(name, path, path.stat().st_size) for name, path in files]
    if max(size for _, _, size in copied) > MAX_MEMBER_BYTES:
        raise BrokenSampleError(record.key, f"it is larger than the {MAX_MEMBER_BYTES} bytes that a shard may hold")
    return PackedRecord(key, ((f"{key}.json", text, len(text)), *copied), side)


def _shards(packed: Iterator[PackedRecord], shard_size: int, max_bytes: int) -> Iterator[list[PackedRecord]]:
    shard: list[PackedRecord] = []
    size = 0
    for record in packed:
        if shard and (len(shard) == shard_size or _padded(size + record.tar_bytes) > max_bytes):
            yield shard
            shard, size = [], 0
        shard.append(record)
        size += record.tar_bytes
    if shard:
        yield shard


def _padded(size: int) -> int:
    """Bytes of a tar with members of this size: an end mark, and zeros up to whole records."""
    return -(-(size + 2 * BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def _finish_shard(output: Path, name: str, shard: Sequence[PackedRecord]) -> bool:
    """Writes a shard with the files beside it, those first: a shard that is there is complete.

    Returns:
        Whether it was there already.
    """
    target = output / f"{name}.tar"
    there = target.exists()
    if there and not _holds(target, shard):
        raise _occupied(target)
    for file, entries in _side_files(name, shard).items():
        content = (json.dumps(entries, ensure_ascii=False, indent=1) + "\n").encode("utf-8", "replace")
        _write_changed(output / file, content)
    if not there:
        _write_tar(target, shard)
    return there


def _side_files(name: str, shard: Sequence[PackedRecord]) -> dict[str, dict[str, Side]]:
    """Returns the files beside a shard with their content, {key: {captioner: caption or score}}."""
    suffixes = sorted({suffix for record in shard for suffix in record.side})
    return {
        f"{name}{suffix}.json": {record.key: record.side[suffix] for record in shard if suffix in record.side}
        for suffix in suffixes
    }


def _write_changed(path: Path, content: bytes) -> None:
    """Writes a file unless it is there already: a finished output may be readable only."""
    if not path.is_file() or path.read_bytes() != content:
        write_atomically(path, content)


def _write_tar(target: Path, shard: Sequence[PackedRecord]) -> None:
    part = target.with_name(f".{target.name}.part")
    try:
        with part.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8") as tar:
                for record in shard:
                    for name, content, size in record.members:
                        _add(tar, name, content, size)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _add(tar: tarfile.TarFile, name: str, content: bytes | Path, size: int) -> None:
    """Adds a member that says nothing about when, where and by whom it was packed."""
    info = tarfile.TarInfo(name)
    info.size = size
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        if isinstance(content, Path) and os.fstat(file.fileno()).st_size != size:
            raise DataError(f"{content} changed while it was packed: run the program again.")
        tar.addfile(info, file)


def _holds(target: Path, shard: Sequence[PackedRecord]) -> bool:
    """Whether a shard has exactly these members; images are compared by size, everything else by content."""
    expected = [member for record in shard for member in record.members]
    with target.open("rb") as file:
        found = walk(file, str(target), total=target.stat().st_size)
        for name, content, size in expected:
            member, read = next(found, (None, None))
            if member is None or read is None or (member.name, member.size) != (name, size):
                return False
            if isinstance(content, bytes) and read() != content:
                return False
        return next(found, None) is None


def _clear(output: Path, *, everything: bool) -> None:
    """Removes what a killed run left half written; with `everything` all shards too, the list of them first."""
    for part in output.glob(".*.part"):
        part.unlink()
    if everything:
        (output / META_FILE).unlink(missing_ok=True)
        for path in output.iterdir():
            if OURS.fullmatch(path.name):
                path.unlink()


def _occupied(path: Path) -> DataError:
    return DataError(
        f"{path} is there and holds something else than this conversion would write: name an empty folder, or give "
        "--overwrite."
    )
