"""State spread over processes, written and read by torch.distributed.checkpoint; never unpickled with code.

When it is written, and what else a checkpoint holds, is in `checkpoints.py`.
"""

import errno
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem

from sana.models.checkpoint import CheckpointError
from sana.training.train_state import plain

METADATA_GLOBALS = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("PosixPath", "PurePosixPath"),
    "pathlib._local": ("PosixPath", "PurePosixPath"),  # Python 3.13
}  # fmt: skip
UNREADABLE = (
    CheckpointError,
    OSError,
    pickle.UnpicklingError,
    EOFError,
    LookupError,
    AttributeError,
    TypeError,
    ValueError,
)


def save_sharded(folder: Path, state: dict[str, Any]) -> None:
    """Writes a state dict of tensors and DTensors; every process must call it.

    Raises:
        OSError: it could not be written, on every process.
        TypeError: it holds values that could not be read back safely.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        dcp.save(
            plain(state, shards=True), storage_writer=dcp.FileSystemWriter(folder), no_dist=not dist.is_initialized()
        )
    except CheckpointException as error:
        raise OSError(errno.EIO, _first_failure(error), str(folder)) from error


def load_sharded(folder: Path, state: dict[str, Any], *, check: Callable[[], None] | None = None) -> None:
    """Reads into a state dict of the same keys and shapes, in place; every process must call it.

    The number of processes, and so the layout of the shards, may be another than at saving.

    Args:
        folder: what `save_sharded` wrote.
        state: tensors are filled; other values are replaced.
        check: called first on each process; what it raises is raised on all.

    Raises:
        CheckpointError: the folder does not fit `state`, is damaged, or holds code.
    """
    try:
        dcp.load(
            state,
            storage_reader=_SafeReader(folder, check),
            planner=_SafePlanner(),
            no_dist=not dist.is_initialized(),
        )
    except CheckpointException as error:
        reason = _first_failure(error)
        raise CheckpointError(
            reason if str(folder.parent) in reason else f"{folder} cannot be loaded: {reason}"
        ) from error


def _first_failure(error: CheckpointException) -> str:
    cause: BaseException | None = next((failure[0] for failure in error.failures.values()), error)
    while cause is not None and not isinstance(cause, OSError) and (cause.__cause__ or cause.__context__):
        cause = cause.__cause__ or cause.__context__
    lines = str(cause).strip().splitlines()
    return lines[0][:300] if lines else type(cause).__name__


class _SafeUnpickler(pickle.Unpickler):
    """Reads the table of shards: its own classes, shapes and dtypes, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in METADATA_GLOBALS.get(module, ()):
            raise pickle.UnpicklingError(f"it asks to run {module}.{name}, and only tensors and numbers are read")
        return super().find_class(module, name)


class _SafeReader(dcp.FileSystemReader):
    """Reads the table safely. DCP swallows errors of `read_metadata`, so they are raised one call later, on all."""

    def __init__(self, folder: Path, check: Callable[[], None] | None) -> None:
        super().__init__(folder)
        self.check, self.error = check, None

    def read_metadata(self) -> dcp.Metadata:
        try:
            if self.check is not None:
                self.check()
            return self._read_table()
        except UNREADABLE as error:
            self.error = error
            return dcp.Metadata({}, storage_data={})

    def set_up_storage_reader(self, *args: Any, **kwargs: Any) -> None:
        if self.error is not None:
            raise self.error
        super().set_up_storage_reader(*args, **kwargs)

    def _read_table(self) -> dcp.Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _SafeUnpickler(file).load()
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise CheckpointError(f"it names the file {info.relative_path!r} outside its own folder")
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class _SafePlanner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        content = plain(torch.load(value, weights_only=True))
        safe = io.BytesIO()
        torch.save(content, safe)  # the base class unpickles: it gets bytes that we wrote
        safe.seek(0)
        super().load_bytes(read_item, safe)
