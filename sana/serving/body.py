"""A request's body, read within a size and a time. What it says is judged in `wishes.py`."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from sana.serving.errors import ApiError

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
DRAINED = 16  # so many times the limit are read to the end, kept or not: else a client would miss the answer
CLOSE = {"Connection": "close"}  # the rest of the body is on its way: nothing else can be read from the connection


class ClientGoneError(RuntimeError):
    """Nobody waits for the answer any more."""


async def read_body(receive: Receive, headers: Mapping[str, str], *, limit: int, seconds: float) -> bytes:
    """Reads a body of JSON.

    Args:
        receive: of ASGI.
        headers: of the request.
        limit: greatest number of bytes, counted as they come, whatever the headers say.
        seconds: for all of it.

    Raises:
        ApiError: it is too large (413), too slow (408), or says to be something else than JSON (415).
        ClientGoneError: the client went away.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a web page of somebody else could send anything else without asking
        raise ApiError(415, "Send JSON with the header 'Content-Type: application/json'.", headers=CLOSE)
    length = headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > DRAINED * limit:
        raise _too_large(limit)
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                chunk = message.get("body", b"")
                size += len(chunk)
                more = message.get("more_body", False)
                if size > limit and (size > DRAINED * limit or not more):
                    raise _too_large(limit)
                if size <= limit:
                    chunks.append(chunk)
                if not more:
                    return b"".join(chunks)
    except TimeoutError:
        text = f"The body did not arrive within {seconds:g} s."
        raise ApiError(408, text, code="request_timeout", headers=CLOSE) from None


async def until_gone(receive: Receive) -> None:
    """Waits until the client goes away. To be called when the whole body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The body may have at most {limit} bytes.", code="request_too_large", headers=CLOSE)
