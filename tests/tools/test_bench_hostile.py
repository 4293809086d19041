"""The hostile requests: drawn by seed, many nearly right, and their exchange with servers that do odd things."""

import asyncio
import json
import random

import pytest

from tools.bench.hostile import GONE, KINDS, ODD, Target, draw, exchange, fuzzed, head, posted


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
    assert drawn.count("fuzzed JSON") == pytest.approx(600, rel=0.2)
    assert json.dumps(ODD)
