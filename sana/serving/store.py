"""Pictures that wait to be fetched by their address: bounded in number, bytes and time, under names nobody guesses."""

import secrets
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True)
class _Kept:
    path: Path
    size: int
    until: float


class PictureStore:
    """PNG files in a folder of its own, which is deleted with the store. Safe to use from several threads.

    Args:
        max_files, max_bytes: kept at most; the oldest go first.
        seconds: how long a picture is kept.
        clock: returns seconds.
    """

    def __init__(
        self, max_files: int, max_bytes: int, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_files, self._max_bytes, self._seconds, self._clock = max_files, max_bytes, seconds, clock
        self._folder = tempfile.TemporaryDirectory(prefix="sana-serving-")  # only this user may look into it
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        with self._lock:
            self._expire()
            return len(self._kept)

    def put(self, png: bytes) -> str:
        """Keeps a picture; returns its name, which says nothing and cannot be guessed."""
        name = f"{secrets.token_urlsafe(24)}.png"
        path = Path(self._folder.name) / name
        path.write_bytes(png)
        with self._lock:
            self._kept[name] = _Kept(path, len(png), self._clock() + self._seconds)
            self._expire()
        return name

    def get(self, name: str) -> bytes | None:
        """Returns a picture; None when there is none of that name, or none any more."""
        with self._lock:
            self._expire()
            kept = self._kept.get(name)  # names are looked up, never joined to a path
            return kept.path.read_bytes() if kept else None

    def close(self) -> None:
        """Deletes everything."""
        with self._lock:
            self._kept.clear()
            self._folder.cleanup()

    def _expire(self) -> None:
        now, total = self._clock(), sum(kept.size for kept in self._kept.values())
        while self._kept:
            name, oldest = next(iter(self._kept.items()))
            if oldest.until > now and len(self._kept) <= self._max_files and total <= self._max_bytes:
                return
            oldest.path.unlink(missing_ok=True)
            total -= oldest.size
            del self._kept[name]
