"""Requests that nobody should send, for measuring whether a server bears them. Who sends them is in `serve.py`."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

PATH = "/v1/images/generations"
GOOD = {"prompt": "a red circle", "steps": 1}
WORDS = ("prompt", "n", "size", "seed", "steps", "guidance", "pag", "stream", "response_format", "model", "x", "")
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2.5, 10**30, -1e308, "", "x", "auto", "64x64", "99999x99999", "1x1", "\u0000",
    "\ud83d" * 50, [], {}, [[]], {"a": {"b": []}}, "a" * 5000,
)  # fmt: skip
PATIENCE = 60.0  # seconds for an answer: a server that needs more hangs
GONE = 0  # stands for an ended connection where a status is expected


@dataclass(frozen=True)
class Target:
    """Where the server listens."""

    host: str
    port: int


def head(method: str = "POST", path: str = PATH, **headers: object) -> bytes:
    """Returns the head of a request; underscores of header names are hyphens."""
    lines = [f"{method} {path} HTTP/1.1", "Host: bench", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")


def posted(body: bytes, kind: str = "application/json") -> bytes:
    """Returns a whole request."""
    return head(Content_Type=kind, Content_Length=len(body)) + body


async def exchange(target: Target, *parts: bytes, wait: float = 0.0, leave: bool = False) -> tuple[int, bytes]:
    """Sends a request and reads the answer.

    Args:
        target: where to.
        *parts: of the request, sent one after the other.
        wait: seconds between two parts.
        leave: go away after the last part, without reading.

    Returns:
        The answer's status and body; `GONE` when the connection ended without one.

    Raises:
        TimeoutError: nothing came for a minute.
    """
    reader, writer = await asyncio.open_connection(target.host, target.port, limit=2**26)
    try:
        async with asyncio.timeout(PATIENCE):
            for index, part in enumerate(parts):
                if index and wait:
                    await asyncio.sleep(wait)
                writer.write(part)
                await writer.drain()
            answer = b"" if leave else await reader.read()
    except ConnectionError:
        answer = b""
    finally:
        writer.close()
    status, _, rest = answer.partition(b"\r\n")
    fields = status.split()
    number = int(fields[1]) if len(fields) > 1 and fields[1].isdigit() else GONE
    return number, rest.partition(b"\r\n\r\n")[2]


def fuzzed(rng: random.Random) -> bytes:
    """Returns JSON that is nearly right, or bytes that are none."""
    choice = rng.random()
    if choice < 0.2:
        return rng.randbytes(rng.randrange(200))
    content = {rng.choice(WORDS): rng.choice(ODD) for _ in range(rng.randrange(6))}
    text = json.dumps(GOOD | content if choice < 0.7 else content).encode()
    if choice < 0.3:
        cut = rng.randrange(len(text))
        return text[:cut] + rng.randbytes(2) + text[cut:]
    return text


async def _fuzz(target: Target, rng: random.Random) -> int:
    return (await exchange(target, posted(fuzzed(rng))))[0]


async def _types(target: Target, rng: random.Random) -> int:
    body = json.dumps(GOOD | {rng.choice(WORDS): rng.choice(ODD)}).encode()
    return (await exchange(target, posted(body)))[0]


async def _sizes(target: Target, rng: random.Random) -> int:
    size = f"{10 ** rng.randrange(12)}x{rng.choice([0, 1, 64, 2**20, 10**12])}"
    body = json.dumps(GOOD | {"size": size, "n": rng.choice([1, 10**9]), "steps": rng.choice([1, 10**9])}).encode()
    return (await exchange(target, posted(body)))[0]


async def _deep(target: Target, rng: random.Random) -> int:
    depth = rng.randrange(1000, 20_000)
    return (await exchange(target, posted(rng.choice([b"[", b'{"prompt":']) * depth)))[0]


async def _large(target: Target, rng: random.Random) -> int:
    """More than a body may hold, in chunks that announce nothing."""
    chunk = b"8000\r\n" + bytes(0x8000) + b"\r\n"
    start = head(Content_Type="application/json", Transfer_Encoding="chunked")
    return (await exchange(target, start, *[chunk] * rng.randrange(3, 20), b"0\r\n\r\n"))[0]


async def _liar(target: Target, rng: random.Random) -> int:
    """A length that is not that of the body, or is no length."""
    length = rng.choice(["999999999999", "-1", "x", "3", "0", "1e3"])
    start = head(Content_Type="application/json", Content_Length=length)
    return (await exchange(target, start + b'{"prompt"', leave=rng.random() < 0.5))[0]


async def _places(target: Target, rng: random.Random) -> int:
    path = rng.choice(
        ["/", "/v1", "/files/../../etc/passwd", "/files/%2e%2e%2f", "/docs", "/v1/models/" + "x" * 900, "/%ff"]
    )
    method = rng.choice(["GET", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE", "POST"])
    return (await exchange(target, head(method, path)))[0]


async def _garbage(target: Target, rng: random.Random) -> int:
    noise = rng.choice([
        rng.randbytes(rng.randrange(1, 500)) + b"\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01" * 50 + b"\n\n",
        head() + b"x" * 10, head(X="y" * 70_000),
    ])  # fmt: skip
    return (await exchange(target, noise, leave=rng.random() < 0.3))[0]


async def _leaver(target: Target, rng: random.Random) -> int:
    """Asks for a long picture and does not wait for it."""
    body = json.dumps(GOOD | {"steps": 100, "n": 2, "stream": rng.random() < 0.5}).encode()
    return (await exchange(target, posted(body), leave=True))[0]


async def _slow(target: Target, rng: random.Random) -> int:
    """Begins and never ends, a byte at a time."""
    start = rng.choice([b"", b"POST /v1", head(Content_Type="application/json", Content_Length=50) + b"{"])
    return (await exchange(target, start, *[b" "] * 20, wait=0.5))[0]


Kind = Callable[[Target, random.Random], Awaitable[int]]
KINDS: dict[str, tuple[Kind, float]] = {  # name -> what it does, and its share
    "fuzzed JSON": (_fuzz, 0.30),
    "wrong types": (_types, 0.20),
    "huge sizes": (_sizes, 0.15),
    "deep nesting": (_deep, 0.05),
    "large bodies": (_large, 0.05),
    "wrong lengths": (_liar, 0.05),
    "other addresses": (_places, 0.10),
    "no HTTP": (_garbage, 0.06),
    "leaving": (_leaver, 0.02),
    "slow": (_slow, 0.02),
}


def draw(rng: random.Random) -> str:
    """Returns the name of a kind, by its share."""
    return rng.choices(list(KINDS), [share for _, share in KINDS.values()])[0]
