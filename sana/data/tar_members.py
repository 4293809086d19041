"""Walking through the members of a tar file or stream, strictly: what is cut, damaged or unsafe is an error.

Python's tarfile ends silently at a damaged header and at a cut between two members; here the end mark must be there.
Nothing is ever extracted to disk. Which members make a record is in `shard_index.py`.
"""

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from sana.data.sample import DataError

BLOCK = 512
MAX_MEMBER_BYTES = 1 << 30  # no image, latents or caption is larger
MAX_EXTENSION_BYTES = 1 << 20  # of a long name or a pax record
SKIP_BYTES = 1 << 20


class Readable(Protocol):
    """What a shard is read from; a file whose size is given is also moved in by `seek`."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True)
class Member:
    """A file in a tar: its name, where its bytes begin, and how many there are."""

    name: str
    offset: int
    size: int


def walk(file: Readable, shard: str, *, total: int | None = None) -> Iterator[tuple[Member, Callable[[], bytes]]]:
    """Yields every file of a tar with a function that reads its bytes, which works until the next file is asked for.

    Args:
        file: at the beginning of the tar; only ever read forward.
        shard: its name, for messages.
        total: size of the tar in bytes, for a file that can seek: what is not asked for is not read then, and a member
            that ends beyond it is refused at once.

    Raises:
        DataError: the tar is cut, damaged or compressed, or holds a member that is unsafe or too large.
    """
    tape = _Tape(file, shard, seekable=total is not None)
    long_name: str | None = None
    while True:
        header = tape.header()
        if header is None:
            tape.check_end()
            return
        name = long_name if long_name is not None else header.name
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE):
            content = tape.extension(header)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                long_name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif header.type == tarfile.XHDTYPE:
                long_name = _pax_path(content, header, shard) or long_name
            continue
        long_name = None
        name = _checked_name(name, header, shard)
        if header.type == tarfile.DIRTYPE:
            continue
        member = Member(name, tape.position, _checked_size(name, header.size, shard, tape.position, total))
        tape.begin(member)
        yield member, tape.content
        tape.finish()


def parse_header(block: bytes) -> tarfile.TarInfo | None:
    """Reads a header block of 512 bytes; None for the zeros that end a tar.

    Raises:
        tarfile.HeaderError: it is no header.
    """
    if not block.strip(b"\0"):
        return None
    return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")


class _Tape:
    """The stream, how far it was read, and the member it stands in."""

    def __init__(self, file: Any, shard: str, *, seekable: bool) -> None:
        self.file, self.shard, self.seekable = file, shard, seekable
        self.position = 0
        self.member = Member("the first header", 0, 0)
        self.unread = 0

    def header(self) -> tarfile.TarInfo | None:
        position = self.position
        block = self.read(BLOCK)
        if position == 0 and block[:2] == b"\x1f\x8b":
            raise DataError(f"{self.shard} is compressed, and shards must be plain tar files: unpack it with gunzip.")
        if len(block) < BLOCK:
            raise DataError(
                f"{self.shard} is cut off after {self.position} bytes, behind {self.member.name}: "
                "the end of the archive is missing; copy it again."
            )
        try:
            return parse_header(block)
        except (tarfile.HeaderError, ValueError) as error:
            raise DataError(
                f"{self.shard} is damaged at byte {position}, behind {self.member.name}: "
                f"no tar header is there ({error})."
            ) from error

    def extension(self, header: tarfile.TarInfo) -> bytes:
        if not 0 <= header.size <= MAX_EXTENSION_BYTES:
            raise DataError(f"{self.shard} holds an extended header of {header.size} bytes behind {self.member.name}.")
        padded = -(-header.size // BLOCK) * BLOCK
        content = self.read(padded)
        if len(content) < padded:
            raise DataError(f"{self.shard} is cut off inside a header behind {self.member.name}; copy it again.")
        return content[: header.size]

    def begin(self, member: Member) -> None:
        self.member = member
        self.unread = -(-member.size // BLOCK) * BLOCK

    def content(self) -> bytes:
        member = self.member
        if self.position != member.offset:
            raise ValueError(f"{self.shard}: {member.name} was read already.")
        data = self.read(member.size)
        self.unread -= len(data)
        if len(data) < member.size:
            self._cut()
        return data

    def finish(self) -> None:
        """Goes on to the next header."""
        if self.seekable:
            self.position += self.unread
            self.unread = 0
            self.file.seek(self.position)
        while self.unread:
            skipped = len(self.read(min(self.unread, SKIP_BYTES)))
            self.unread -= skipped
            if not skipped:
                self._cut()

    def check_end(self) -> None:
        """The rest must be zeros: records behind the end mark would be lost without a word."""
        while rest := self.read(SKIP_BYTES):
            if rest.count(0) != len(rest):
                raise DataError(
                    f"{self.shard} goes on behind its end mark, after {self.member.name}: "
                    "it was damaged, or is several archives in one file; write it anew."
                )

    def read(self, size: int) -> bytes:
        pieces = []
        while size and (piece := self.file.read(size)):
            pieces.append(piece)
            size -= len(piece)
            self.position += len(piece)
        return b"".join(pieces)

    def _cut(self) -> None:
        raise DataError(
            f"{self.shard} is cut off inside {self.member.name}: the file ends at byte {self.position}, and "
            f"the member needs {self.member.offset + self.member.size}; copy it again."
        )


def _checked_name(name: str, header: tarfile.TarInfo, shard: str) -> str:
    reason = None
    if name.startswith(("/", "\\")) or name[1:2] == ":":
        reason = "an absolute path"
    elif ".." in name.replace("\\", "/").split("/"):
        reason = "a path with '..'"
    elif "\0" in name or not name:
        reason = "an empty or broken name"
    elif header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.DIRTYPE):
        kinds = {tarfile.LNKTYPE: "a hard link", tarfile.SYMTYPE: "a symbolic link", tarfile.GNUTYPE_LONGLINK: "a link"}
        reason = kinds.get(header.type, "a device or special file")
    if reason:
        raise DataError(f"{shard} holds the member {name!r}, which is {reason}: it is not safe and was refused.")
    while name.startswith("./"):
        name = name[2:]
    return name


def _checked_size(name: str, size: int, shard: str, offset: int, total: int | None) -> int:
    if not 0 <= size <= MAX_MEMBER_BYTES:
        raise DataError(f"{shard}: the member {name} claims {size} bytes; at most {MAX_MEMBER_BYTES} are allowed.")
    if total is not None and offset + size > total:
        raise DataError(
            f"{shard} is cut off inside {name}: the file has {total} bytes, and the member needs {offset + size}; "
            "copy it again."
        )
    return size


def _pax_path(content: bytes, header: tarfile.TarInfo, shard: str) -> str | None:
    """Returns the path of a pax header; refuses the entries that would change where bytes are."""
    path, rest = None, content
    while rest:
        length_text, space, _ = rest.partition(b" ")
        length = int(length_text) if length_text.isdigit() and len(length_text) < 8 else 0
        record = rest[len(length_text) + 1 : length]
        if not space or length <= len(length_text) + 1 or not record.endswith(b"\n"):
            raise DataError(f"{shard} has a damaged extended header before {header.name}.")
        key, _, value = record[:-1].partition(b"=")
        if key == b"size" or key.startswith(b"GNU.sparse"):
            raise DataError(f"{shard} holds a sparse or oversized member ({header.name}), which is refused.")
        if key == b"path":
            path = value.decode("utf-8", "surrogateescape")
        rest = rest[length:]
    return path
