"""Small tar files for the tests of shards."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def picture(width: int = 12, height: int = 8, colour: tuple[int, int, int] = (200, 30, 60), kind: str = "PNG") -> bytes:
    """The content of an image file of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, kind)
    return file.getvalue()


def description(prompt: str | None = "a caption", width: int = 12, height: int = 8, **more: object) -> bytes:
    """The content of a record's JSON."""
    return json.dumps({"prompt": prompt, "width": width, "height": height, **more}).encode()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def tar_bytes(members: Iterable[tuple[str | tarfile.TarInfo, bytes]], *, form: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar written by Python's own library."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def records(count: int, *, start: int = 0) -> list[tuple[str, bytes]]:
    """Members of records "0000", "0001", ...: a picture whose colour is the number, and its description."""
    members = []
    for number in range(start, start + count):
        key = f"{number:04d}"
        members.append((f"{key}.png", picture(colour=(number, number, number))))
        members.append((f"{key}.json", description(f"caption {number}")))
    return members


def write_shards(folder: Path, *counts: int) -> list[Path]:
    """Writes 000000.tar, 000001.tar, ... with so many records each; keys go on over the shards."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, start = [], 0
    for number, count in enumerate(counts):
        paths.append(folder / f"{number:06d}.tar")
        paths[-1].write_bytes(tar_bytes(records(count, start=start)))
        start += count
    return paths
