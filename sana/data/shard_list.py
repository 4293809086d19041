"""Which tar shards a data set has: folders, files, `wids-meta.json`, and addresses that are fetched once.

What is inside a shard is in `shard_index.py`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urljoin, urlsplit

from filelock import FileLock

from sana.data.sample import DataError
from sana.data.shard_index import ShardIndex, build_index, read_index, write_atomically
from sana.data.shard_urls import expand_braces, is_command, is_remote, is_web, open_command
from sana.utils.hub import FetchError, resolve
from sana.utils.logging import get_logger

logger = get_logger(__name__)

META_FILE = "wids-meta.json"
ABSENT = (403, 404, 410)  # statuses of a file that is not there; object stores answer 403
CACHE = Path("~/.cache/sana/shards")


@dataclass(frozen=True)
class ShardEntry:
    """A shard that a data set names.

    Attributes:
        location: path or address.
        name: short and stable: the path inside the data set, without ".tar"; part of the records' keys.
        nsamples: how many records it must have; None where nothing says so.
        filesize: in bytes, likewise.
    """

    location: str
    name: str
    nsamples: int | None = None
    filesize: int | None = None


def list_shards(data_dir: str | Sequence[str], *, sort: bool = False) -> list[ShardEntry]:
    """Returns the shards of a data set in their order. Addresses of shards are not opened yet.

    Args:
        data_dir: one or several of: a folder (its wids-meta.json decides, else every .tar below it), a .tar file, a
            wids-meta.json, and their http(s) addresses; `s3://...tar`, `pipe:COMMAND`. `{000..003}` stands for many.
            A command is run only when it stands here, never from a wids-meta.json.
        sort: order all shards by their names.

    Raises:
        DataError: nothing is there, or a wids-meta.json is damaged or names what it must not.
        FetchError: a wids-meta.json cannot be fetched.
    """
    places = [data_dir] if isinstance(data_dir, str | os.PathLike) else list(data_dir)
    if not places:
        raise DataError("No data was given: set data.data_dir to a folder of tar shards.")
    entries = [entry for place in places for entry in _list_place(str(place))]
    if not entries:
        raise DataError(f"No tar shards were found in {', '.join(map(str, places))}.")
    entries = _unique_names(entries)
    return sorted(entries, key=lambda entry: entry.name) if sort else entries


def open_shards(
    entries: Iterable[ShardEntry], *, cache_dir: str | Path | None = None
) -> list[tuple[ShardEntry, ShardIndex]]:
    """Fetches what is remote, indexes every shard and holds it against what its wids-meta.json says.

    Raises:
        DataError: a shard is missing, damaged, unsafe, or not as the metadata says.
        FetchError: a shard cannot be fetched.
    """
    folder = None if cache_dir is None else Path(cache_dir).expanduser()
    opened = []
    for entry in entries:
        path = fetch_shard(entry.location, folder) if is_remote(entry.location) else Path(entry.location)
        index = read_index(path, cache_dir=folder)
        _compare(entry, index)
        opened.append((entry, index))
    if not any(len(index) for _, index in opened):
        raise DataError(
            f"{', '.join(str(index.path) for _, index in opened[:3])}: no record with an image or latents was found."
        )
    return opened


def read_wids_meta(content: bytes, place: str) -> list[dict[str, Any]]:
    """Returns the shard list of a wids-meta.json: dictionaries with `url`, `nsamples` and perhaps `filesize`.

    Raises:
        DataError: it is damaged, or of another kind; names `place`.
    """
    try:
        shards = json.loads(content)["shardlist"]
        for shard in shards:
            if not isinstance(shard["url"], str) or not shard["url"]:
                raise ValueError(f"the url {shard['url']!r} is no text")
            for field in ("nsamples", "filesize"):
                number = shard.get(field)
                if number is not None and (not isinstance(number, int) or number < 0):
                    raise ValueError(f"{field} of {shard['url']} is {number!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{place} is no list of shards ({error!r}): delete it to have it made anew.") from error
    return list(shards)


def wids_meta(shards: Iterable[tuple[str, int, int]], *, name: str = "sana-dev") -> bytes:
    """Returns the content of a wids-meta.json for shards of (url, number of records, size in bytes)."""
    listed = [{"url": url, "nsamples": count, "filesize": size} for url, count, size in shards]
    meta = {"name": name, "__kind__": "SANA-WebDataset", "wids_version": 1, "shardlist": listed}
    return (json.dumps(meta, indent=4) + "\n").encode()


def keep_wids_meta(opened: Sequence[tuple[ShardEntry, ShardIndex]], folder: Path) -> bool:
    """Writes the wids-meta.json of a folder that has none, if it can be written.

    Returns:
        Whether it was written.
    """
    if (folder / META_FILE).exists():
        return False
    inside = [index for _, index in opened if folder in index.path.parents]
    content = wids_meta((i.path.relative_to(folder).as_posix(), len(i), i.stamp[0]) for i in inside)
    try:
        write_atomically(folder / META_FILE, content)
    except OSError as error:
        logger.info("%s is not kept: %s", folder / META_FILE, error)
        return False
    return True


def fetch_shard(location: str, cache_dir: Path | None = None) -> Path:
    """Returns the local copy of a remote shard, fetched once.

    Args:
        location: http(s) or s3 address, or `pipe:COMMAND`.
        cache_dir: where the output of commands is kept [~/.cache/sana/shards]; web downloads have their own place.

    Raises:
        DataError: the command fails, or what it gave is no whole tar.
        FetchError: the download fails.
    """
    if is_web(location):
        return resolve(location)
    digest = hashlib.sha256(location.encode()).hexdigest()[:16]
    target = (cache_dir or CACHE.expanduser()) / f"{digest}.tar"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if not target.exists():
            part = target.with_suffix(".part")
            with open_command(location) as source, part.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
            build_index(part)  # a command may end early and call it success
            os.replace(part, target)
    return target


def beside(location: str, path: Path, suffix: str) -> Path | None:
    """Returns the file `<shard without .tar><suffix>.json` beside a shard, fetched if need be; None without one.

    Args:
        location: of the shard; beside a command's output there is nothing.
        path: of the shard's local copy.
        suffix: such as "_VILA1-5-13B".

    Raises:
        FetchError: it is there, and cannot be fetched.
    """
    if is_command(location):
        return None
    if not is_web(location):
        file = path.with_name(f"{path.stem}{suffix}.json")
        return file if file.is_file() else None
    address = urlsplit(location)
    try:
        return resolve(address._replace(path=f"{address.path.removesuffix('.tar')}{suffix}.json").geturl())
    except FetchError as error:
        if isinstance(error.__cause__, HTTPError) and error.__cause__.code in ABSENT:
            return None
        raise


def _list_place(place: str) -> list[ShardEntry]:
    if is_command(place):
        return [ShardEntry(url, _command_name(url)) for url in expand_braces(place)]
    return [
        entry for part in expand_braces(place) for entry in (_list_web(part) if is_web(part) else _list_local(part))
    ]


def _command_name(url: str) -> str:
    return f"pipe-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


def _list_web(url: str) -> list[ShardEntry]:
    path = urlsplit(url).path
    if path.endswith(".tar"):
        return [ShardEntry(url, Path(path).stem)]
    meta = url if path.endswith(".json") else f"{url.rstrip('/')}/{META_FILE}"
    entries = []
    for shard in read_wids_meta(resolve(meta).read_bytes(), meta):
        address = urljoin(meta, shard["url"])
        if not is_web(address):
            raise DataError(f"{meta} names the shard {shard['url']!r}; from a web address only web addresses are read.")
        entries.append(ShardEntry(address, _short(shard["url"]), shard.get("nsamples"), shard.get("filesize")))
    return entries


def _list_local(place: str) -> list[ShardEntry]:
    path = Path(place).expanduser()
    if path.suffix == ".tar":
        return [ShardEntry(str(path), path.stem)]
    if path.is_file():
        return _list_meta(path)
    if not path.is_dir():
        raise DataError(f"There is no data at {place}: it is neither a folder, nor a .tar file, nor a {META_FILE}.")
    found = sorted(file for file in path.rglob("*.tar") if not file.name.startswith("."))
    if not (path / META_FILE).is_file():
        return [ShardEntry(str(file), _short(file.relative_to(path).as_posix())) for file in found]
    entries = _list_meta(path / META_FILE)
    unlisted = {str(file) for file in found} - {entry.location for entry in entries}
    if unlisted:
        logger.warning(
            "%s does not name %d of the shards there, such as %s: they are not used; delete it to use them",
            path / META_FILE,
            len(unlisted),
            min(unlisted),
        )
    return entries


def _list_meta(meta: Path) -> list[ShardEntry]:
    entries = []
    try:
        content = meta.read_bytes()
    except OSError as error:
        raise DataError(f"{meta} cannot be read: {error.strerror or error}.") from error
    for shard in read_wids_meta(content, str(meta)):
        url = shard["url"]
        if is_remote(url) and not is_web(url):
            raise DataError(f"{meta} names {url!r}; commands and s3 addresses are accepted only in data.data_dir.")
        location = url if is_web(url) else str(meta.parent / url)
        if not is_web(url) and not Path(location).is_file():
            raise DataError(f"{meta} names the shard {url}, and there is no file {location}.")
        entries.append(ShardEntry(location, _short(url), shard.get("nsamples"), shard.get("filesize")))
    return entries


def _short(url: str) -> str:
    """The name of a shard in keys: its relative path, or the last part of an absolute one."""
    path = urlsplit(url).path if is_web(url) else url
    clean = path.removeprefix("./").removesuffix(".tar")
    return clean.rpartition("/")[2] if is_web(url) or clean.startswith(("/", "..")) else clean


def _unique_names(entries: list[ShardEntry]) -> list[ShardEntry]:
    """Puts the name of the folder before equal names, and numbers what is still equal."""
    for attempt in range(2):
        counts: dict[str, int] = {}
        for entry in entries:
            counts[entry.name] = counts.get(entry.name, 0) + 1
        seen: dict[str, int] = {}
        renamed = []
        for entry in entries:
            name = entry.name
            if counts[name] > 1 and attempt == 0:
                name = f"{urlsplit(entry.location).path.rsplit('/', 2)[-2]}/{name}" if "/" in entry.location else name
            elif counts[name] > 1:
                seen[name] = seen.get(name, 0) + 1
                name = f"{name}#{seen[name]}"
            renamed.append(ShardEntry(entry.location, name, entry.nsamples, entry.filesize))
        entries = renamed
    return entries


def _compare(entry: ShardEntry, index: ShardIndex) -> None:
    size = index.stamp[0]
    if entry.filesize is not None and entry.filesize != size:
        raise DataError(
            f"{index.path} has {size} bytes, and its {META_FILE} says {entry.filesize}: "
            f"copy the shard again, or delete the {META_FILE} to have it made anew."
        )
    if entry.nsamples is not None and entry.nsamples not in index.counts:
        raise DataError(
            f"{index.path} has {len(index)} records, and its {META_FILE} says {entry.nsamples}: "
            f"copy the shard again, or delete the {META_FILE} to have it made anew."
        )
