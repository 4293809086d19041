"""Durable files: each is the old or the new one whatever happens, and `torch.load(weights_only=True)` reads it.

Folders of a whole training run, made of such files, are in `checkpoints.py`.
"""

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

PLAIN = (NoneType, bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size)


def save_train_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes `state` (tensors, numbers, strings, dicts, lists) so that the file is either the old or the new one.

    Raises:
        OSError: it could not be written; the old file is untouched.
        TypeError: `state` holds something else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    try:
        write_tensors(partial, plain(state))
        sync_file(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def load_train_state(path: Path) -> dict[str, Any] | None:
    """The saved state, or None where nothing was saved yet."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None


def write_text(path: Path, text: str) -> None:
    """Replaces a small text file atomically and durably."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    sync_file(partial)
    os.replace(partial, path)
    sync_folder(path.parent)


def write_tensors(path: Path, value: Any) -> None:
    """`torch.save` that reports a full disk as the OSError it is; neither atomic nor synced.

    Raises:
        OSError: the file could not be written.
    """
    with path.open("wb") as file:
        watched = _WatchedFile(file)
        try:
            torch.save(value, watched)
        except RuntimeError as error:  # torch hides the error of the file behind its own
            raise watched.error or OSError(errno.EIO, f"torch.save failed: {error}", str(path)) from error


def sync_file(path: Path) -> None:
    """Returns once the contents of a file are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Returns once the names in a folder (new, renamed, removed files) are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


def plain(value: Any, *, copy: bool = False, shards: bool = False, where: str = "state") -> Any:
    """The same state on the CPU, in nothing but what `torch.load(weights_only=True)` reads.

    Mappings become dicts, numpy scalars Python numbers, parameters tensors. A view is cut out of its storage, which
    torch would otherwise save whole.

    Args:
        value: tensors, numbers, strings and None in mappings, lists, tuples and sets.
        copy: no tensor of the result shares memory with `value`: a snapshot.
        shards: leave tensors as they are (for `torch.distributed.checkpoint`), check everything else.
        where: name of the value in messages.

    Raises:
        TypeError: something else is in it; the message says where.
    """
    if type(value) in PLAIN:
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor):
        return value if shards else _plain_tensor(value, copy, where)
    if isinstance(value, Mapping):
        return {
            plain(key, where=f"a key of {where}"): plain(v, copy=copy, shards=shards, where=f"{where}[{key!r}]")
            for key, v in value.items()
        }
    if type(value) in (list, tuple, set):
        return type(value)(
            plain(v, copy=copy, shards=shards, where=f"{where}[{index}]") for index, v in enumerate(value)
        )
    raise TypeError(
        f"{where} is of type {type(value).__name__}, which cannot be stored safely; allowed are tensors, numbers, "
        "strings and None in dicts, lists, tuples and sets."
    )


def _plain_tensor(value: Tensor, copy: bool, where: str) -> Tensor:
    if type(value) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
        raise TypeError(f"{where} is a {type(value).__name__}; tensors spread over processes are saved as `sharded`.")
    tensor = value.detach().to("cpu", copy=copy)
    used = tensor.numel() * tensor.element_size()
    return tensor.clone() if not copy and tensor.untyped_storage().nbytes() > used else tensor


class _WatchedFile:
    """What torch writes to; remembers the error of the disk."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.error = file, None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()
