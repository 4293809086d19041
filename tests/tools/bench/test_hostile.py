"""The hostile requests: drawn by seed, many nearly right, and their exchange with servers that do odd things."""

import asyncio
import json
import random

import pytest

from tools.bench.hostile import (
    GONE,
    KINDS,
    ODD,
    SECRET,
    Target,
    answers,
    complaint,
    draw,
    exchange,
    fuzzed,
    head,
    posted,
)  # fmt: skip


def exchanged(answer, *parts, leave=False):
    """Returns what `exchange` makes of a server that reads something, says `answer` and closes."""
    seen = bytearray()

    async def run():
        async def speak(reader, writer):
            seen.extend(await reader.read(2**16))
            writer.write(answer)
            writer.close()

        server = await asyncio.start_server(speak, "127.0.0.1", 0)
        async with server:
            host, port = server.sockets[0].getsockname()
            return await exchange(Target(host, port), *parts, leave=leave)

    return asyncio.run(run()), bytes(seen)


def test_an_exchange_gives_status_and_body():
    (status, body), seen = exchanged(b"HTTP/1.1 404 Not Found\r\nA: b\r\n\r\nnothing", posted(b"{}"))
    assert (status, body) == (404, b"nothing")
    assert seen.startswith(b"POST /v1/images/generations HTTP/1.1\r\n")
    assert seen.endswith(b"\r\nContent-Length: 2\r\n\r\n{}")


@pytest.mark.parametrize("answer", [b"", b"HTTP", b"\x00\xff\r\n\r\n"])
def test_no_answer_is_no_error_of_ours(answer):
    assert exchanged(answer, head("GET", "/"))[0][0] == GONE


def test_the_same_seed_draws_the_same_requests():
    first, second = ([fuzzed(random.Random(seed)) for seed in range(50)] for _ in range(2))
    assert first == second and len(set(first)) > 40


def test_fuzzed_bodies_are_partly_json_partly_none():
    def parses(body):
        try:
            json.loads(body)
        except ValueError:
            return False
        return True

    share = sum(parses(fuzzed(random.Random(seed))) for seed in range(300)) / 300
    assert 0.3 < share < 0.9


def test_kinds_are_drawn_by_their_shares():
    assert sum(share for _, share in KINDS.values()) == pytest.approx(1.0)
    rng = random.Random(0)
    drawn = [draw(rng) for _ in range(2000)]
    assert set(drawn) == set(KINDS)
    assert drawn.count("fuzzed JSON") == pytest.approx(400, rel=0.2)
    assert json.dumps(ODD)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_bears_a_server_that_closes_at_once(name):
    async def run():
        async def speak(reader, writer):
            writer.close()

        server = await asyncio.start_server(speak, "127.0.0.1", 0)
        async with server:
            host, port = server.sockets[0].getsockname()
            return await KINDS[name][0](Target(host, port), random.Random(1))

    assert [status for status, _ in asyncio.run(run())] == [GONE]


def test_several_answers_of_one_connection():
    first, second = (b"HTTP/1.1 %d X\r\nContent-Length: 3\r\n\r\nab%d" % (code, code % 10) for code in (200, 404))
    assert answers(first + second) == [(200, b"ab0"), (404, b"ab4")]
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n"
    assert answers(first + chunked) == [(200, b"ab0"), (200, b"3\r\n")]
    assert answers(b"") == answers(b"no http") == [(GONE, b"")]


def test_complaints():
    def error(status=400, **changes):
        body = {"message": "No.", "type": "invalid_request_error", "param": None, "code": "x"} | changes
        return complaint(status, json.dumps({"error": body}).encode())

    assert error() is None and error(503) is None and complaint(200, SECRET.encode()) is None
    assert complaint(404, None) is None, "an answer to HEAD has no body"
    assert error(message="") == "400 has other fields" and error(more=1) == "400 has other fields"
    assert error(message=f"not {SECRET}") == f"400 holds {SECRET!r}"
    assert error(500, message="in /usr/lib/x") == "500 holds '/usr'"
    for body in (b"Invalid HTTP request received.", b"", b"[]", b'{"detail": 1}', b'{"error": 3}'):
        assert complaint(400, body) == "400 has another form"
