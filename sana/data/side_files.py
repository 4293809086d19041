"""JSON files beside a shard, `{key: {captioner: ...}}`: one entry is read at a time, and only positions are kept.

A file is scanned once and may be far larger than what fits into the memory of every worker. What the entries mean is
in `captions.py`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sana.data.sample import BrokenSampleError, DataError

_DECODER = json.JSONDecoder()
_BLANK = " \t\r\n"


class SideFile:
    """The entries of the records of one shard in one file.

    Args:
        path: of the JSON file.
        keys: of the shard's records, in order.

    Raises:
        DataError: the file cannot be read, or is no JSON mapping.
    """

    def __init__(self, path: Path, keys: Sequence[str]) -> None:
        self.path = path
        try:
            found = _positions(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{path} is not a readable JSON mapping ({error}): repair or remove it.") from error
        self.spans = np.array([found.get(key, (0, 0)) for key in keys], np.int64).reshape(len(keys), 2)

    def entry(self, record: int, key: str) -> Any:
        """Reads the entry of a record, {} where it has none.

        Args:
            record: its position.
            key: its name for messages.

        Raises:
            BrokenSampleError: the file has changed.
        """
        begin, end = self.spans[record].tolist()
        if not end:
            return {}
        try:
            with self.path.open("rb") as file:
                file.seek(begin)
                return json.loads(file.read(end - begin))
        except (OSError, ValueError, RecursionError) as error:
            raise BrokenSampleError(key, f"{self.path} has changed or cannot be read: {error}") from error


class SideEntries:
    """The same for a shard whose keys are not known before it is read: the whole file is kept while that lasts.

    Args:
        path: of the JSON file.

    Raises:
        DataError: the file cannot be read, or is no JSON mapping.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.content = path.read_bytes()
            self.spans = _positions(self.content)
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{path} is not a readable JSON mapping ({error}): repair or remove it.") from error

    def entry(self, key: str) -> Any:
        """Returns the entry of a record, {} where it has none."""
        begin, end = self.spans.get(key, (0, 0))
        return json.loads(self.content[begin:end]) if end else {}


def _positions(content: bytes) -> dict[str, tuple[int, int]]:
    """Returns where the value of every key of a JSON mapping begins and ends, in bytes."""
    text = content.decode("latin-1")  # a character for each byte; the syntax of JSON is ASCII
    position = _skip(text, 3 if content.startswith(b"\xef\xbb\xbf") else 0, "{")
    found: dict[str, tuple[int, int]] = {}
    while not text.startswith("}", position):
        if found:
            position = _skip(text, position, ",")
        begin = position
        key, position = _DECODER.raw_decode(text, begin)
        if not isinstance(key, str):
            raise ValueError(f"a name is missing at byte {begin}")
        key = key if key.isascii() else json.loads(content[begin:position])
        begin = _skip(text, position, ":")
        _, position = _DECODER.raw_decode(text, begin)
        found[key] = (begin, position)
        position = _blank_end(text, position)
    if text[position + 1 :].strip():
        raise ValueError(f"something follows the mapping at byte {position + 1}")
    return found


def _skip(text: str, position: int, sign: str) -> int:
    position = _blank_end(text, position)
    if not text.startswith(sign, position):
        raise ValueError(f"{sign!r} is missing at byte {position}")
    return _blank_end(text, position + 1)


def _blank_end(text: str, position: int) -> int:
    while position < len(text) and text[position] in _BLANK:
        position += 1
    return position
