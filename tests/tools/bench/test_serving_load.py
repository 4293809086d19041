"""Throughput and latency: percentiles by hand, and clients against a server that answers as it is told."""

import asyncio
import json

import pytest

from tools.bench.hostile import Target
from tools.bench.serving_load import ENOUGH, load, percentile


@pytest.mark.parametrize(("percent", "expected"), [(50, 2), (75, 3), (95, 4), (99, 4), (100, 4), (1, 1)])
def test_percentiles_are_values_that_occurred(percent, expected):
    assert percentile([4, 2, 1, 3], percent) == expected


def loaded(clients, seconds, bad=0):
    """Returns what `load` finds, and the bodies that the server was sent; it refuses the first `bad` of them."""
    seen, most, now = [], 0, 0

    async def run():
        async def speak(reader, writer):
            nonlocal most, now
            now += 1
            most = max(most, now)
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0])
            seen.append(json.loads(await reader.readexactly(length)))
            answer = b"HTTP/1.1 429 X\r\n\r\n" if len(seen) <= bad else b'HTTP/1.1 200 X\r\n\r\n{"b64_json": ""}'
            await asyncio.sleep(0)
            now -= 1
            writer.write(answer)
            writer.close()

        server = await asyncio.start_server(speak, "127.0.0.1", 0)
        async with server:
            return await load(Target(*server.sockets[0].getsockname()), clients, seconds, {"prompt": "x"})

    return asyncio.run(run()), seen, most


def test_every_client_asks_again_with_another_seed():
    found, seen, most = loaded(3, 0.3)
    assert found["clients"] == 3 and found["pictures"] == len(seen) >= 3 and found["failures"] == {}
    assert len({one["seed"] for one in seen}) == len(seen) and most <= 3
    assert found["a_second"] == pytest.approx(found["pictures"] / found["seconds"])
    assert 0 < found["p50"] <= found["seconds"]


def test_failures_are_no_pictures_and_few_latencies_have_no_percentiles():
    found, seen, _ = loaded(2, 1e-9, bad=1)
    assert len(seen) == 2 < ENOUGH and found["pictures"] == 1 and found["failures"] == {"429": 1}
    assert found["p50"] > 0 and found["p95"] is None and found["p99"] is None
