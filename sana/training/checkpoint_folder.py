"""What a checkpoint folder looks like, which one is whole, and reading it. Writing is in `checkpoints.py`.

checkpoints/
  latest                    text: the name of the newest folder
  step_00000400/            whole, because it got this name last
    checkpoint.json         step, world size, and size and CRC-32 of every other file
    shared.pt               what all processes have in common
    rank_00000.pt           what one process alone has
    sharded/                torch.distributed.checkpoint
    ...                     exported weights
  step_00000600.partial/    being written, or left by a killed run: never read
  step_00000400.replaced/   the former step 400 while a new one takes its place
  step_00000200.trash/      being deleted
"""

import json
import os
import pickle
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from sana.models.checkpoint import CheckpointError
from sana.utils.logging import get_logger

logger = get_logger(__name__)

INDEX, LATEST, SHARED, SHARDED = "checkpoint.json", "latest", "shared.pt", "sharded"
FORMAT_VERSION = 1
PARTIAL, REPLACED, TRASH = ".partial", ".replaced", ".trash"
_FOLDER = re.compile(r"step_(\d{8,})(\.replaced)?")


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.pt"


@dataclass(frozen=True)
class CheckpointIndex:
    """`checkpoint.json`.

    Attributes:
        step: optimiser steps done.
        world_size: processes that wrote it.
        files: name relative to the folder -> (bytes, CRC-32).
        torch_version: of the writer.
    """

    step: int
    world_size: int
    files: dict[str, tuple[int, int]]
    torch_version: str = field(default_factory=lambda: str(torch.__version__))

    def to_json(self) -> str:
        content = {
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "world_size": self.world_size,
            "torch": self.torch_version,
            "files": {n: {"bytes": size, "crc32": f"{crc:08x}"} for n, (size, crc) in sorted(self.files.items())},
        }
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> "CheckpointIndex":
        """Reads the index of a folder and compares the sizes of its files.

        Raises:
            CheckpointError: the folder is no whole checkpoint; the message says why.
        """
        try:
            content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            version = content["format_version"]
            files = {name: (int(entry["bytes"]), int(entry["crc32"], 16)) for name, entry in content["files"].items()}
            index = cls(int(content["step"]), int(content["world_size"]), files, str(content["torch"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder} is no checkpoint: {INDEX} cannot be read ({error!r}).") from error
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{folder} has format {version}; this program reads {FORMAT_VERSION}.")
        for name, (size, _) in files.items():
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise CheckpointError(f"{folder} names the file {name!r} outside its own folder.")
            found = (folder / name).stat().st_size if (folder / name).is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes instead of {size}"
                raise CheckpointError(f"{folder} is damaged: {name} {state}; use another checkpoint.")
        return index

    def check(self, folder: Path, names: Iterable[str]) -> None:
        """Compares the contents of files with their recorded CRC-32.

        Raises:
            CheckpointError: one differs, or is not listed.
        """
        for name in names:
            if name not in self.files:
                raise CheckpointError(f"{folder} has no {name}: it was saved without.")
            if checksum(folder / name)[1] != self.files[name][1]:
                raise CheckpointError(f"{folder} is damaged: the contents of {name} changed; use another checkpoint.")


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What a checkpoint holds besides its shards and exported weights.

    Attributes:
        step: optimiser steps done.
        shared: what rank 0 saved for all.
        per_rank: what this rank saved; None when the number of processes was another.
        world_size: processes that saved it.
        path: its folder.
    """

    step: int
    shared: dict[str, Any]
    per_rank: dict[str, Any] | None
    world_size: int
    path: Path

    @cached_property
    def all_ranks(self) -> list[dict[str, Any]]:
        """What every rank saved, in the order of ranks; read on first use.

        Raises:
            CheckpointError: a file is damaged.
        """
        index = CheckpointIndex.read(self.path)
        return [_read(self.path, index, rank_file(rank)) for rank in range(self.world_size)]


def load_checkpoint(folder: Path, *, rank: int = 0, world_size: int = 1) -> LoadedCheckpoint:
    """Reads one checkpoint folder, checking every byte it reads.

    Raises:
        CheckpointError: it is not whole, damaged, or holds code.
    """
    index = CheckpointIndex.read(folder)
    same = index.world_size == world_size
    per_rank = _read(folder, index, rank_file(rank)) if same else None
    return LoadedCheckpoint(index.step, _read(folder, index, SHARED), per_rank, index.world_size, folder)


def latest_checkpoint(root: Path, *, thorough: bool = False) -> Path | None:
    """The folder that `latest` names or, where that is broken, the newest whole one; None when there is none at all.

    Args:
        root: the folder of checkpoints.
        thorough: compare the contents of files too, those of `sharded/` excepted (`load_sharded` does), not only sizes.

    Raises:
        CheckpointError: there are checkpoints, but none is whole: starting anew would lose the run.
    """
    named = _named_by_latest(root)
    candidates = checkpoint_folders(root)
    if named is not None:
        candidates = [named, *(folder for folder in candidates if folder != named)]
    for folder in candidates:
        try:
            index = CheckpointIndex.read(folder)
            if thorough:
                index.check(folder, (name for name in index.files if not name.startswith(f"{SHARDED}/")))
        except (CheckpointError, OSError) as error:
            logger.warning("%s", error)
            continue
        if candidates.index(folder) or named is None:
            logger.warning("%s is missing or points to no whole checkpoint; taking %s", root / LATEST, folder)
        return folder
    if candidates:
        raise CheckpointError(
            f"{root} holds {len(candidates)} checkpoints (newest: {candidates[0].name}) and all are damaged; "
            "move them away to start anew."
        )
    return None


def checkpoint_folders(root: Path) -> list[Path]:
    """Folders named like a checkpoint, newest first, whole or not."""
    if not root.is_dir():
        return []
    found = [(match, path) for path in root.iterdir() if (match := _FOLDER.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found, key=lambda pair: (-int(pair[0][1]), pair[0][2] or ""))]


def step_of(folder: Path) -> int:
    match = _FOLDER.fullmatch(folder.name)
    assert match is not None, folder
    return int(match[1])


def files_in(folder: Path) -> Iterator[Path]:
    """Regular files below a folder; links are left out, as what they point to counts."""
    for parent, _, names in os.walk(folder):
        yield from (path for path in (Path(parent) / name for name in names) if not path.is_symlink())


def checksum(path: Path) -> tuple[int, int]:
    """(bytes, CRC-32) of a file."""
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc


def _named_by_latest(root: Path) -> Path | None:
    try:
        name = (root / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return root / name if _FOLDER.fullmatch(name) and (root / name).is_dir() else None


def _read(folder: Path, index: CheckpointIndex, name: str) -> dict[str, Any]:
    try:
        index.check(folder, [name])
        content = torch.load(folder / name, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"{folder / name} cannot be read: {detail}") from error
    return content
