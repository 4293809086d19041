"""The server that tells what it holds: the counts see what is kept, and it is the same server."""

import asyncio
import io
import json

import pytest

from tools.bench import watched_server


def test_holdings_see_what_is_kept():
    watched_server.holdings()  # collects what other tests left
    before = watched_server.holdings()
    kept = [[] for _ in range(50_000)]
    after = watched_server.holdings()
    assert after["objects"] - before["objects"] == pytest.approx(50_000, abs=500)
    assert after["blocks"] - before["blocks"] == pytest.approx(50_000, abs=5000)
    del kept
    assert watched_server.holdings()["objects"] - before["objects"] == pytest.approx(0, abs=500)


def test_native_memory_is_seen_and_given_back():
    before = watched_server.native_bytes()
    kept = bytearray(2**22)
    assert watched_server.native_bytes() - before >= 2**22
    del kept
    assert watched_server.native_bytes() - before < 2**20


def test_tasks_count_until_they_are_done():
    async def run():
        waiting = asyncio.Event()
        tasks = [asyncio.create_task(waiting.wait()) for _ in range(3)]
        during = watched_server.holdings()["tasks"]
        waiting.set()
        await asyncio.gather(*tasks)
        return during, watched_server.holdings()["tasks"]

    during, after = asyncio.run(run())
    assert during - after == 3


def test_every_line_is_answered_and_the_arguments_are_the_servers(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(watched_server.serve, "main", lambda arguments: seen.append(arguments) or 7)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert watched_server.main(["--port=0"]) == 7 and seen == [["--port=0"]]
    monkeypatch.setattr("sys.stdin", io.StringIO("?\n?\n"))
    watched_server.answer()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2 and all(one["objects"] > 0 for one in lines)
