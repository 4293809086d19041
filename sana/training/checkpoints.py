"""Checkpoints of a run: folders that are whole or absent, written by every rank, in the background if wanted.

What a folder looks like and how it is read is in `checkpoint_folder.py`; what a run puts in is the trainer's business.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sana.models.checkpoint import CheckpointError
from sana.training import sharded_state
from sana.training.checkpoint_folder import (
    INDEX,
    LATEST,
    PARTIAL,
    REPLACED,
    SHARDED,
    SHARED,
    TRASH,
    CheckpointIndex,
    LoadedCheckpoint,
    checkpoint_folders,
    checksum,
    files_in,
    folder_name,
    latest_checkpoint,
    load_checkpoint,
    rank_file,
    step_of,
)
from sana.training.train_state import plain, sync_file, sync_folder, write_tensors, write_text
from sana.utils import distributed
from sana.utils.logging import get_logger

logger = get_logger(__name__)

Export = Callable[[Path], object]
MARKER = re.compile(r"rank_\d+\.(done|failed)(\.partial)?")  # how ranks tell rank 0 that their part is written
POLL_SECONDS = 0.02
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointWriteError(RuntimeError):
    """A checkpoint or its folder could not be written; the message is one sentence for the user."""


class Checkpoints:
    """The checkpoints of one run: its only writer. To look at them from elsewhere use `checkpoint_folder`.

    Every rank makes one (in a process group they wait for one another) and calls `save` equally often with the same
    steps; the folder must be shared by all. What a killed run left half-written is removed here, by rank 0.

    Args:
        folder: `work_dir/checkpoints`.
        rank: of this process.
        world_size: number of processes.
        keep_last: so many of the newest stay.
        keep_every: those whose step is a multiple of this stay for ever; 0: none.
        asynchronous: `save` takes a snapshot in main memory and returns; files are written in the background.
        timeout_s: how long rank 0 waits for the others' files.
    """

    def __init__(
        self, folder: str | Path, *, rank: int = 0, world_size: int = 1, keep_last: int = 3, keep_every: int = 0,
        asynchronous: bool = False, timeout_s: float = 600.0,
    ) -> None:  # fmt: skip
        if keep_last < 1 or keep_every < 0 or not 0 <= rank < world_size:
            raise ValueError(f"{keep_last=} must be >= 1, {keep_every=} >= 0 and {rank=} below {world_size=}.")
        self.folder, self.rank, self.world_size = Path(folder), rank, world_size
        self.keep_last, self.keep_every = keep_last, keep_every
        self.asynchronous, self.timeout_s = asynchronous, timeout_s
        self._attempt = 0  # tells this save's files from those of a failed one of the same step
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")  # joined at exit
        self._pending: Future[None] | None = None
        if rank == 0:
            _clean(self.folder)
        distributed.barrier()  # no rank writes what rank 0 would take for a leftover

    def save(
        self, step: int, *, shared: Mapping[str, Any] | None = None, per_rank: Mapping[str, Any] | None = None,
        sharded: Mapping[str, Any] | None = None, export: Export | None = None,
    ) -> None:  # fmt: skip
        """Writes the checkpoint of a step, first waiting for the previous one; an older one of the step is replaced.

        Rank 0 returns (or, asynchronously, its background thread ends) when the checkpoint is whole, other ranks when
        their part is. `sharded` and `export` are written before this returns in any case.

        Args:
            step: optimiser steps done.
            shared: state that all ranks have in common, taken from rank 0.
            per_rank: this rank's own state.
            sharded: state dict with DTensors, for `torch.distributed.checkpoint`; then every rank must give it.
            export: called on rank 0 with the folder to write further files into. If it returns a function, that
                writes the rest and may run in the background: it must not read what training changes.

        Raises:
            CheckpointWriteError: this checkpoint or the previous one could not be written; older ones are untouched.
            TypeError: the state holds what could not be read back safely.
        """
        if step < 0:
            raise ValueError(f"{step=} must not be negative.")
        self.wait()
        self._attempt += 1
        partial = self.folder / f"{folder_name(step)}{PARTIAL}"
        with self._reporting(partial):
            partial.mkdir(parents=True, exist_ok=True)
            state = {rank_file(self.rank): plain(per_rank or {}, copy=self.asynchronous, where="per_rank")}
            if self.rank == 0:
                state[SHARED] = plain(shared or {}, copy=self.asynchronous, where="shared")
            if sharded is not None:
                sharded_state.save_sharded(partial / SHARDED, dict(sharded))
            later = export(partial) if export is not None and self.rank == 0 else None
        if self.asynchronous:
            self._pending = self._writer.submit(self._write_behind, step, partial, state, later)
        else:
            self._write(step, partial, state, later)

    def wait(self) -> None:
        """Returns when nothing is being written.

        Raises:
            CheckpointWriteError: the write in the background failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def latest(self, *, thorough: bool = False) -> Path | None:
        """The newest whole checkpoint, by sizes or (`thorough`) by contents; see `latest_checkpoint`."""
        return latest_checkpoint(self.folder, thorough=thorough)

    def load(self, path: str | Path | None = None) -> LoadedCheckpoint:
        """Reads a checkpoint, by default the newest whose contents are intact: every rank finds the same.

        Raises:
            CheckpointError: there is none, or the one asked for is damaged.
        """
        chosen = latest_checkpoint(self.folder, thorough=True) if path is None else Path(path)
        if chosen is None:
            raise CheckpointError(f"{self.folder} holds no checkpoint.")
        return load_checkpoint(chosen, rank=self.rank, world_size=self.world_size)

    def load_sharded(self, path: str | Path, state_dict: dict[str, Any]) -> None:
        """Fills a state dict (same keys and shapes, any number of processes) from the shards; all ranks must call it.

        Raises:
            CheckpointError: on every rank, if one finds its part damaged or unfitting.
        """
        folder = Path(path)

        def check() -> None:
            index = CheckpointIndex.read(folder)
            names = sorted(name for name in index.files if name.startswith(f"{SHARDED}/"))
            if not names:
                raise CheckpointError(f"{folder} has no sharded state: it was saved without FSDP.")
            index.check(folder, names[self.rank :: self.world_size])

        sharded_state.load_sharded(folder / SHARDED, state_dict, check=check)

    def _write_behind(self, *arguments: Any) -> None:
        try:
            self._write(*arguments)
        except BaseException as error:
            logger.error("%s", error)  # the run may end before anybody waits for the write
            raise

    def _write(self, step: int, partial: Path, state: dict[str, Any], later: object) -> None:
        with self._reporting(partial):
            for name, value in state.items():
                write_tensors(partial / name, value)
            if callable(later):
                later()
            if self.rank:
                own = [partial / rank_file(self.rank), *(partial / SHARDED).glob(f"__{self.rank}_*")]
                self._tell(partial, "done", _seal(partial, own))
                return
            files = self._others(partial)
            files |= _seal(partial, (path for path in files_in(partial) if _is_payload(partial, path, files)))
            for marker in [path for path in partial.iterdir() if MARKER.fullmatch(path.name)]:
                marker.unlink()
            write_text(partial / INDEX, CheckpointIndex(step, self.world_size, files).to_json())
            self._publish(step, partial)

    def _tell(self, partial: Path, kind: str, content: Any) -> None:
        write_text(partial / f"rank_{self.rank:05d}.{kind}", json.dumps([self._attempt, content]))

    def _others(self, partial: Path) -> dict[str, tuple[int, int]]:
        """Waits for the other ranks' files; no collective, so it may run beside training."""
        files: dict[str, tuple[int, int]] = {}
        waiting, deadline = set(range(1, self.world_size)), time.monotonic() + self.timeout_s
        while waiting:
            for rank in sorted(waiting):
                if (failure := self._told(partial, rank, "failed")) is not None:
                    raise OSError(errno.EIO, f"rank {rank} failed: {failure}")
                if (done := self._told(partial, rank, "done")) is not None:
                    files |= {name: tuple(entry) for name, entry in done.items()}
                    waiting.remove(rank)
            if waiting and time.monotonic() > deadline:
                raise OSError(
                    errno.ETIMEDOUT,
                    f"nothing from rank {min(waiting)} within {self.timeout_s:g} s; "
                    "it died, or does not see the same folder",
                )
            if waiting:
                time.sleep(POLL_SECONDS)
        return files

    def _told(self, partial: Path, rank: int, kind: str) -> Any:
        try:
            attempt, content = json.loads((partial / f"rank_{rank:05d}.{kind}").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return content if attempt == self._attempt else None

    def _publish(self, step: int, partial: Path) -> None:
        """Gives the whole folder its name, points `latest` at it, and removes what need not be kept."""
        final, replaced = self.folder / folder_name(step), self.folder / f"{folder_name(step)}{REPLACED}"
        pointer = self.folder / f"{LATEST}{PARTIAL}"  # written first: a full disk shows before the names change
        pointer.write_text(f"{final.name}\n", encoding="utf-8")
        sync_file(pointer)
        if final.exists():
            _discard(replaced)
            os.rename(final, replaced)
        os.rename(partial, final)
        sync_folder(self.folder)
        os.replace(pointer, self.folder / LATEST)
        sync_folder(self.folder)
        _discard(replaced)
        self._prune(step)

    def _prune(self, step: int) -> None:
        """Removes old checkpoints; those of later steps (the run went back) stay until the run gets there."""
        older = [folder for folder in checkpoint_folders(self.folder) if step_of(folder) <= step]
        whole = [folder for folder in older if _is_whole(folder)]
        oldest_kept = step_of(whole[: self.keep_last][-1])
        for folder in older:
            for_ever = self.keep_every and step_of(folder) % self.keep_every == 0
            if step_of(folder) < oldest_kept and not for_ever:
                _discard(folder)

    @contextlib.contextmanager
    def _reporting(self, partial: Path) -> Iterator[None]:
        """Cleans up after any failure; one of the disk becomes a CheckpointWriteError."""
        try:
            yield
        except BaseException as error:
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):  # the folder may be gone, or the disk full
                    self._tell(partial, "failed", str(error))
            if not isinstance(error, OSError | SafetensorError):
                raise
            raise CheckpointWriteError(
                f"{partial.with_suffix('')} could not be written ({_reason(error)}); earlier checkpoints are "
                f"untouched: {_advice(error)}."
            ) from error


def check_writable(folder: str | Path) -> None:
    """Makes a folder and tries to write into it: to be called before anything long starts.

    Raises:
        CheckpointWriteError: it cannot be written.
    """
    folder = Path(folder)
    probe = folder / f".probe_{uuid.uuid4().hex[:12]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(bytes(4096))
            sync_file(probe)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointWriteError(
            f"work_dir {folder} cannot be written ({_reason(error)}): {_advice(error)}, or choose another work_dir."
        ) from error


def _seal(root: Path, paths: Any) -> dict[str, tuple[int, int]]:
    """Brings files, and the names in their folders, to the disk; returns their sizes and CRC-32."""
    sealed, folders = {}, {Path()}  # relative to the root
    for path in paths:
        sync_file(path)
        sealed[path.relative_to(root).as_posix()] = checksum(path)
        folders |= set(path.relative_to(root).parents)
    for folder in folders:
        sync_folder(root / folder)
    return sealed


def _is_payload(root: Path, path: Path, known: Mapping[str, Any]) -> bool:
    name = path.relative_to(root).as_posix()
    return name not in known and name != INDEX and not MARKER.fullmatch(name)


def _is_whole(folder: Path) -> bool:
    try:
        CheckpointIndex.read(folder)
    except CheckpointError:
        return False
    return True


def _discard(folder: Path) -> None:
    """Deletes a folder under another name, so that a kill leaves nothing that looks like a checkpoint."""
    trash = folder.parent / f"{folder_name(step_of(folder))}{TRASH}"
    if folder.exists():
        _remove(trash)
        try:
            os.rename(folder, trash)
        except OSError as error:
            logger.warning("%s could not be removed: %s", folder, error)
        _remove(trash)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, onerror=lambda _, path, info: _log_leftover(path, info[1]))


def _log_leftover(path: str, error: BaseException) -> None:
    if not isinstance(error, FileNotFoundError):
        logger.warning("%s could not be removed: %s", path, error)


def _clean(root: Path) -> None:
    """Removes what a killed run left, and finishes a replacement that was cut between its two renames."""
    if not root.is_dir():
        return
    for folder in checkpoint_folders(root):
        final = root / folder_name(step_of(folder))
        if folder != final:
            if final.exists() and not _is_whole(final):
                _discard(final)
            if final.exists():
                _discard(folder)
            else:
                os.rename(folder, final)
    for leftover in [*root.glob(f"step_*{PARTIAL}"), *root.glob(f"step_*{TRASH}")]:
        logger.info("removing %s, left by a run that was stopped", leftover)
        _remove(leftover)
    (root / f"{LATEST}{PARTIAL}").unlink(missing_ok=True)


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _advice(error: BaseException) -> str:
    code = error.errno if isinstance(error, OSError) else None
    text = str(error)
    if code in FULL or "No space left" in text or "File too large" in text or "quota" in text:
        return "make room on that disk and start again"
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "change its permissions"
    if code in (errno.EEXIST, errno.ENOTDIR):
        return "remove the file that is in its place"
    return "see that the disk and all processes work, then start again"
