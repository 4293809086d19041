"""Addresses of remote shards: telling them apart, writing out braces, and opening them as streams.

A command (`pipe:...`) runs through the shell: only what the user wrote in data.data_dir may come here.
"""

import contextlib
import shlex
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from sana.data.sample import DataError

COMMANDS = ("pipe:", "s3://")
TIMEOUT = 30.0  # seconds without a byte


def is_web(place: str) -> bool:
    """Whether a place is an http(s) address."""
    return place.startswith(("http://", "https://"))


def is_command(place: str) -> bool:
    """Whether a place is read through a program: `pipe:COMMAND` or `s3://...` (with `aws s3 cp`)."""
    return place.startswith(COMMANDS)


def is_remote(place: str) -> bool:
    """Whether a place is anything but a local path."""
    return is_web(place) or is_command(place)


def expand_braces(place: str) -> list[str]:
    """Writes out `{000000..000003}` and `{a,b}` as a shell would; several places may be joined by "::"."""
    if "{" not in place and "::" not in place:
        return [place]
    from webdataset.shardlists import expand_urls

    expanded: list[str] = expand_urls(place)
    return expanded


@contextlib.contextmanager
def open_web(url: str) -> Iterator[Any]:
    """Opens an http(s) address for reading.

    Raises:
        DataError: it cannot be opened.
    """
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "sana-python"})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except (urllib.error.URLError, OSError) as error:
        raise DataError(f"{url} cannot be opened: {error}.") from error
    with response:
        yield response


@contextlib.contextmanager
def open_command(place: str) -> Iterator[Any]:
    """Opens the output of `pipe:COMMAND`, or an s3 address through the `aws` program, for reading.

    Raises:
        DataError: the program fails; not if the reader stopped early.
    """
    from webdataset.gopen import gopen

    command = f"pipe:aws s3 cp {shlex.quote(place)} -" if place.startswith("s3://") else place
    stream = _Finished(gopen(command))
    try:
        yield stream
    except BaseException:
        stream.close(ignore_errors=True)
        raise
    stream.close(ignore_errors=not stream.ended)


class _Finished:
    """A webdataset stream that knows whether it was read to its end, and whose failures are data errors."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.ended = stream, False

    def read(self, size: int, /) -> bytes:
        try:
            content: bytes = self.stream.read(size)
        except OSError as error:
            raise DataError(f"A command of data.data_dir failed: {error}.") from error
        self.ended = self.ended or not content
        return content

    def close(self, *, ignore_errors: bool) -> None:
        self.stream.ignore_errors = ignore_errors
        try:
            self.stream.close()
        except OSError as error:
            raise DataError(f"A command of data.data_dir failed: {error}.") from error


@contextlib.contextmanager
def open_stream(place: str) -> Iterator[Any]:
    """Opens a shard for reading forward: local path, http(s) or s3 address, or command.

    Raises:
        DataError: it cannot be opened, or its command fails.
    """
    if is_web(place):
        with open_web(place) as stream:
            yield stream
    elif is_command(place):
        with open_command(place) as stream:
            yield stream
    else:
        try:
            file = open(place, "rb")  # noqa: SIM115 - closed below; an OSError of the reader is not ours
        except OSError as error:
            raise DataError(f"The shard {place} cannot be read: {error.strerror or error}.") from error
        with file:
            yield file
