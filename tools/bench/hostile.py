"""Requests that nobody should send, for measuring whether a server bears them. Who sends them is in `serve.py`.

Every answer that is an error is read: it must have OpenAI's form, and hold neither a path nor anything of a prompt.
"""

import asyncio
import json
import random
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

PATH = "/v1/images/generations"
SECRET = "sesame"  # in every prompt; no error may hold it
GOOD = {"prompt": f"a red circle {SECRET}", "steps": 1}
WORDS = ("prompt", "n", "size", "seed", "steps", "guidance", "pag", "stream", "response_format", "model", "x", "")
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2.5, 10**30, -1e308, "", "x", "auto", "64x64", "99999x99999", "1x1", "\u0000",
    "\ud83d" * 50, [], {}, [[]], {"a": {"b": []}}, SECRET * 800,
)  # fmt: skip
SIZES = ("-64x64", "64x-64", "0x0", "64", "x", "64x64x64", "6.4e1x64", "\u0661\u0662x64", " 64x64", "99999x99999")
FORBIDDEN = (SECRET.encode(), b"Traceback", b"site-packages", b".py", b"/home", b"/usr", b"/root", b"/tmp", b"/etc")
PATIENCE = 60.0  # seconds for an answer: a server that needs more hangs
GONE = 0  # stands for an ended connection where a status is expected
Answer = tuple[int, bytes | None]  # status and body; None where there is none by rule


@dataclass(frozen=True)
class Target:
    """Where the server listens."""

    host: str
    port: int


def head(method: str = "POST", path: str = PATH, **headers: object) -> bytes:
    """Returns the head of a request; underscores of header names are hyphens. The connection ends with the answer."""
    lines = [f"{method} {path} HTTP/1.1", "Host: bench", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")


def posted(body: bytes, kind: str = "application/json") -> bytes:
    """Returns a whole request."""
    return head(Content_Type=kind, Content_Length=len(body)) + body


def wished(**content: object) -> bytes:
    """Returns the whole request of a good wish with something changed."""
    return posted(json.dumps(GOOD | content).encode())


async def exchange(
    target: Target, *parts: bytes, wait: float = 0.0, leave: bool = False, half: bool = False
) -> tuple[int, bytes]:
    """Sends a request and reads the answer.

    Args:
        target: where to.
        *parts: of the request, sent one after the other.
        wait: seconds between two parts.
        leave: go away after the last part, without reading.
        half: close the sending half of the connection after the last part.

    Returns:
        The answer's status and body; `GONE` when the connection ended without one.

    Raises:
        TimeoutError: nothing came for a minute.
    """
    return answers(await raw(target, *parts, wait=wait, leave=leave, half=half))[0]


async def raw(target: Target, *parts: bytes, wait: float = 0.0, leave: bool = False, half: bool = False) -> bytes:
    """Does what `exchange` does; returns all that came until the end of the connection."""
    reader, writer = await asyncio.open_connection(target.host, target.port, limit=2**26)
    try:
        async with asyncio.timeout(PATIENCE):
            for index, part in enumerate(parts):
                if index and wait:
                    await asyncio.sleep(wait)
                writer.write(part)
                await writer.drain()
            if half:
                writer.write_eof()
            return b"" if leave else await reader.read()
    except OSError:  # the server has cut the connection off
        return b""
    finally:
        writer.close()


def answers(received: bytes) -> list[tuple[int, bytes]]:
    """Returns status and body of each answer on one connection; of `GONE` alone where there is none."""
    found: list[tuple[int, bytes]] = []
    while received:
        start, _, rest = received.partition(b"\r\n\r\n")
        status, *fields = start.split(b"\r\n")
        words = status.split()
        if len(words) < 2 or not words[1].isdigit():
            break
        lengths = [line.partition(b":")[2] for line in fields if line.lower().startswith(b"content-length:")]
        length = int(lengths[0]) if lengths else len(rest)
        found.append((int(words[1]), rest[:length]))
        received = rest[length:]
    return found or [(GONE, b"")]


def complaint(status: int, body: bytes | None) -> str | None:
    """Returns what is wrong about an answer, None where nothing is."""
    if status < 400 or body is None:
        return None
    leaked = next((one for one in FORBIDDEN if one in body), None)
    if leaked is not None:
        return f"{status} holds {leaked.decode()!r}"
    try:
        error = json.loads(body)["error"]
        whole = set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]
    except (ValueError, TypeError, KeyError):
        return f"{status} has another form"
    return None if whole else f"{status} has other fields"


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


async def _fuzz(target: Target, rng: random.Random) -> list[Answer]:
    return [await exchange(target, posted(fuzzed(rng)))]


async def _odd_json(target: Target, rng: random.Random) -> list[Answer]:
    """What JSON's grammar allows and nobody expects, and what is nearly JSON."""
    inner = rng.choice([
        b"NaN", b"-Infinity", b"1e999", b"1" * 5000, b"-" + b"9" * 300, b"0.1e-400", b"01", b"+1", b"0x10", b"1.",
        b"'x'", b'"\\ud83d"', b'"\\ud83d\\ude00"', b'"\\udc00\\ud800"', b'"\\u0000"', b'"\xff\xfe"', b'"\xed\xa0\x80"',
        b'"\x01"',
        b"[" * 90 + b"]" * 90, b'{"a":' * 90 + b"1" + b"}" * 90, b'"' + b"\\u0041" * 5000 + b'"',
    ])  # fmt: skip
    name = rng.choice(WORDS[:-1]).encode()
    own = json.dumps(GOOD).encode()[1:-1]
    body = rng.choice([
        b"{" + own + b', "' + name + b'": ' + inner + b"}",
        b"{" + own + b', "n": 1, "n": 2, "steps": ' + inner + b', "steps": 1}',
        b"\xef\xbb\xbf{" + own + b"}", json.dumps(GOOD).encode("utf-16"), b"{" + own + b"} {}", b"{" + own + b",}",
    ])  # fmt: skip
    return [await exchange(target, posted(body))]


async def _types(target: Target, rng: random.Random) -> list[Answer]:
    return [await exchange(target, wished(**{rng.choice(WORDS): rng.choice(ODD)}))]


async def _sizes(target: Target, rng: random.Random) -> list[Answer]:
    size = f"{10 ** rng.randrange(12)}x{rng.choice([0, 1, 64, 2**20, 10**12])}"
    given = {"size": rng.choice([size, *SIZES]), "n": rng.choice([1, -1, 10**9]), "steps": rng.choice([1, -3, 10**9])}
    return [await exchange(target, wished(**given))]


async def _kinds(target: Target, rng: random.Random) -> list[Answer]:
    """A body that says to be something else than JSON."""
    kind = rng.choice(["text/plain", "multipart/form-data; boundary=x", "", "application/jsonx", "*/*",
                       "application/xml", "application/x-www-form-urlencoded", "x" * 3000])  # fmt: skip
    return [await exchange(target, posted(json.dumps(GOOD).encode(), kind))]


async def _deep(target: Target, rng: random.Random) -> list[Answer]:
    depth = rng.randrange(1000, 20_000)
    return [await exchange(target, posted(rng.choice([b"[", b'{"prompt":']) * depth))]


async def _large(target: Target, rng: random.Random) -> list[Answer]:
    """More than a body may hold, in chunks that announce nothing."""
    chunk = b"8000\r\n" + bytes(0x8000) + b"\r\n"
    start = head(Content_Type="application/json", Transfer_Encoding="chunked")
    return [await exchange(target, start, *[chunk] * rng.randrange(3, 20), b"0\r\n\r\n")]


async def _liar(target: Target, rng: random.Random) -> list[Answer]:
    """A length that is not that of the body, or is no length."""
    length = rng.choice(["999999999999", "-1", "x", "3", "0", "1e3", "+3", "0x3", "9" * 400])
    start = head(Content_Type="application/json", Content_Length=length)
    return [await exchange(target, start + b'{"prompt"', leave=rng.random() < 0.5)]


async def _smuggled(target: Target, rng: random.Random) -> list[Answer]:
    """Requests whose end two servers in a row could see at two places."""
    lines = rng.choice([
        "Content-Length: 6\r\nTransfer-Encoding: chunked", "Transfer-Encoding: chunked\r\nContent-Length: 40",
        "Transfer-Encoding: xchunked", "Transfer-Encoding: chunked, chunked", "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding : chunked", "Transfer-Encoding:\x0bchunked", "Content-Length: 3\r\nContent-Length: 5",
        "Content-Length: 3, 5", "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity", "Content-Length: 3\n X: y",
        "Transfer-Encoding: chunked", "X: a\r\n folded: b", "Host: other", "Content-Length: 3\rX: y",
    ])  # fmt: skip
    chunks = rng.choice([
        b"-1\r\n", b"xyz\r\n", b"ffffffffffffffffffff\r\n", b"0\r\n\r\nGET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
        b"3\r\nabcd\r\n",
        b"0x3\r\nabc\r\n0\r\n\r\n", b"3;" + b"e" * 3000 + b"\r\nabc\r\n0\r\n\r\n", b"3\nabc\n0\n\n",
    ])  # fmt: skip
    start = head(Content_Type="application/json").removesuffix(b"\r\n") + f"{lines}\r\n\r\n".encode()
    return list(answers(await raw(target, start + chunks, half=rng.random() < 0.5)))


async def _flood(target: Target, rng: random.Random) -> list[Answer]:
    """Heads that are too much: many lines, long ones, a long address, a long method."""
    start = rng.choice([
        head("GET", "/health", **{f"X{index}": "y" for index in range(2000)}), head("GET", "/health", X="y" * 100_000),
        head("GET", "/" + "x" * 100_000), head("G" * 50_000, "/"), head("GET", "/health", Cookie="a=b; " * 20_000),
        head("GET", "/health", Authorization="Bearer " + "k" * 60_000)[:-2],
    ])  # fmt: skip
    return [await exchange(target, start)]


async def _places(target: Target, rng: random.Random) -> list[Answer]:
    path = rng.choice(
        ["/", "/v1", "/files/../../etc/passwd", "/files/%2e%2e%2f", "/docs", "/v1/models/" + "x" * 900, "/%ff",
         "//etc/passwd", "/v1/images/generations/", "http://other/health", "*", f"/?{SECRET}", "/files/%00",
         "/v1/images/edits"]
    )  # fmt: skip
    method = rng.choice(["GET", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE", "POST"])
    status, body = await exchange(target, head(method, path))
    return [(status, None if method == "HEAD" else body)]


async def _pipelined(target: Target, rng: random.Random) -> list[Answer]:
    """Many requests in one breath, perhaps with something in their middle that is none."""
    one = b"GET /health HTTP/1.1\r\nHost: bench\r\n\r\n"
    body = json.dumps({"prompt": SECRET, "n": 0}).encode()
    wrong = posted(body).replace(b"Connection: close\r\n", b"")
    parts = [rng.choice([one, one, wrong]) for _ in range(rng.randrange(2, 30))]
    if rng.random() < 0.5:
        parts[rng.randrange(len(parts))] = rng.choice([b"\x00\r\n\r\n", b"GET\r\n\r\n", wrong[:-5]])
    return list(answers(await raw(target, b"".join(parts) + head("GET", "/health"), leave=rng.random() < 0.3)))


async def _garbage(target: Target, rng: random.Random) -> list[Answer]:
    noise = rng.choice([
        rng.randbytes(rng.randrange(1, 500)) + b"\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01" * 50 + b"\n\n",
        head() + b"x" * 10, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\r\n" * 100, b"GET /health\r\n\r\n",
        head("GET", "/health", Upgrade="websocket", Connection="Upgrade"),
        head(Expect="100-continue", Content_Length=5),
    ])  # fmt: skip
    return list(answers(await raw(target, noise, leave=rng.random() < 0.3)))


async def _leaver(target: Target, rng: random.Random) -> list[Answer]:
    """Asks for a long picture and does not wait for it."""
    return [await exchange(target, wished(steps=100, n=2, stream=rng.random() < 0.5), leave=True)]


async def _half_open(target: Target, rng: random.Random) -> list[Answer]:
    """Sends a request, or a part of one, and says that nothing more will come."""
    whole = wished(steps=rng.choice([1, 50]), seed=1)
    return [await exchange(target, whole[: rng.choice([0, 30, -5, len(whole)])], half=True)]


async def _stream_leaver(target: Target, rng: random.Random) -> list[Answer]:
    """Follows a stream for some events and goes, politely or by a reset."""
    reader, writer = await asyncio.open_connection(target.host, target.port)
    try:
        async with asyncio.timeout(PATIENCE):
            writer.write(wished(steps=100, stream=True, partial_images=rng.choice([0, 3])))
            received = await reader.readuntil(b"\r\n\r\n")
            for _ in range(rng.randrange(4)):
                received += await reader.readuntil(b"\n\n")
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        return [(GONE, b"")]
    finally:
        if rng.random() < 0.5:
            linger = struct.pack("ii", 1, 0)  # close() then sends a reset
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()
    return [(answers(received)[0][0], None)]


async def _slow(target: Target, rng: random.Random) -> list[Answer]:
    """Begins and never ends, a byte at a time."""
    start = rng.choice([b"", b"POST /v1", head(Content_Type="application/json", Content_Length=50) + b"{"])
    return [await exchange(target, start, *[b" "] * 20, wait=0.5)]


Kind = Callable[[Target, random.Random], Awaitable[list[Answer]]]
KINDS: dict[str, tuple[Kind, float]] = {  # name -> what it does, and its share
    "fuzzed JSON": (_fuzz, 0.20),
    "odd JSON": (_odd_json, 0.10),
    "wrong types": (_types, 0.12),
    "huge and negative sizes": (_sizes, 0.12),
    "other content types": (_kinds, 0.04),
    "deep nesting": (_deep, 0.04),
    "large bodies": (_large, 0.04),
    "wrong lengths": (_liar, 0.05),
    "smuggling": (_smuggled, 0.07),
    "header floods": (_flood, 0.03),
    "pipelining": (_pipelined, 0.03),
    "other addresses": (_places, 0.06),
    "no HTTP": (_garbage, 0.04),
    "leaving": (_leaver, 0.015),
    "leaving a stream": (_stream_leaver, 0.015),
    "half-open": (_half_open, 0.015),
    "slow": (_slow, 0.015),
}


def draw(rng: random.Random) -> str:
    """Returns the name of a kind, by its share."""
    return rng.choices(list(KINDS), [share for _, share in KINDS.values()])[0]
