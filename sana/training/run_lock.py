"""One training a work_dir: a lock that the kernel takes back when its process ends, however that happens.

Only the main process of a run holds it. What a run writes is elsewhere.
"""

import errno
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sana.training.checkpoints import CheckpointWriteError
from sana.utils.logging import get_logger

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = get_logger(__name__)

LOCK_NAME = ".lock"
TAKEN = (errno.EACCES, errno.EAGAIN)
GREATEST = 4096  # bytes of a holder's description


@dataclass
class _Held:
    """A lock of this process.

    Attributes:
        descriptor: of the locked file.
        process: that locked it; a forked child has a copy of this object and not the lock.
        count: how many `RunLock`s hold it. The kernel's locks are those of a process: it would grant this one a second,
            and take both back when either descriptor is closed.
    """

    descriptor: int
    process: int
    count: int = 1


_HELD: dict[Path, _Held] = {}  # by the resolved path of the lock file


class WorkDirInUseError(CheckpointWriteError):
    """Another process trains into the folder."""


class RunLock:
    """Holds a work_dir for this process's run.

    POSIX record locks (`lockf`) are used rather than `flock`: children such as the processes that read images do not
    inherit them, so a killed run can go on at once, although its children take seconds to notice. They reach across
    machines where the network file system passes them on (NFS with its lock service); where it does not, two machines
    are not kept apart.

    Args:
        work_dir: of the run; created.
        main: whether this process is the one that writes.
        gather: value -> every process's value, in the order of ranks; called by all of them together.
    """

    def __init__(self, work_dir: str | Path, *, main: bool, gather: Callable[[Any], list[Any]]) -> None:
        self.work_dir, self.main, self.gather = Path(work_dir), main, gather
        self._path: Path | None = None

    def acquire(self) -> None:
        """Takes the lock, or keeps it. Every process of the run must call it, and all fail together.

        Raises:
            WorkDirInUseError: another process has it; the message says which.
            CheckpointWriteError: the folder cannot be written.
        """
        refusal: CheckpointWriteError | None = None
        if self.main and self._path is None:
            try:
                self._path = _take(self.work_dir)
            except CheckpointWriteError as error:
                refusal = error
        first = self.gather(refusal)[0]
        if first is not None:
            raise refusal or first

    @contextmanager
    def acquired(self) -> Iterator[None]:
        """Takes the lock around what prepares a run, and keeps it unless that fails."""
        self.acquire()
        try:
            yield
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Gives the lock back; does nothing where it is not held."""
        path, self._path = self._path, None
        held = None if path is None else _held(path)
        if path is None or held is None:
            return
        held.count -= 1
        if held.count == 0:
            del _HELD[path]
            os.ftruncate(held.descriptor, 0)
            os.close(held.descriptor)

    def __del__(self) -> None:
        self.release()


def _held(path: Path) -> _Held | None:
    """This very process's lock of a file."""
    held = _HELD.get(path)
    return held if held is not None and held.process == os.getpid() else None


def _take(work_dir: Path) -> Path:
    """Locks the file in a folder; returns its path."""
    path = work_dir.resolve() / LOCK_NAME
    if (held := _held(path)) is not None:
        held.count += 1
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise CheckpointWriteError(
            f"work_dir {work_dir} cannot be written ({error.strerror}): allow that, or choose another work_dir."
        ) from error
    try:
        _lock(descriptor, work_dir)
        _describe(descriptor, work_dir)
    except BaseException:
        os.close(descriptor)
        raise
    _HELD[path] = _Held(descriptor, os.getpid())
    return path


def _lock(descriptor: int, work_dir: Path) -> None:
    if fcntl is None:
        logger.warning("this system has no record locks: do not start two trainings into %s", work_dir)
        return
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in TAKEN:
            logger.warning(
                "the file system of %s keeps no locks (%s): do not start two trainings into it",
                work_dir,
                error.strerror,
            )
            return
        holder = _read(descriptor)
        who = f"process {holder['pid']} on {holder['host']} (since {holder['since']})" if holder else "another process"
        raise WorkDirInUseError(
            f"work_dir {work_dir} is in use: {who} trains into it; stop that one or wait for its end, or choose "
            "another work_dir."
        ) from error


def _describe(descriptor: int, work_dir: Path) -> None:
    """Writes who holds the lock, for the sentence that others read; says so if another machine's run never ended."""
    before, host = _read(descriptor), socket.gethostname()
    if before and before["host"] != host:
        logger.warning(
            "the last run into %s was process %s on %s, and it did not end by itself; make sure that it is over: locks "
            "may not reach from machine to machine",
            work_dir, before["pid"], before["host"],
        )  # fmt: skip
    since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": host, "since": since}).encode(), 0)


def _read(descriptor: int) -> dict[str, Any] | None:
    """What the file says about its holder; None where it says nothing that can be read."""
    try:
        said = json.loads(os.pread(descriptor, GREATEST, 0))
    except ValueError:
        return None
    return said if isinstance(said, dict) and {"pid", "host", "since"} <= said.keys() else None
