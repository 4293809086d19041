"""Hostile requests against a server that answers everything alike: what is counted, and when the process is asked."""

import asyncio

from tests.tools.bench.serving_results import HELD
from tools.bench.attack import attack
from tools.bench.hostile import Target


class Process:
    """Stands for a watched server; its memory is the number of questions so far."""

    def __init__(self):
        self.asked = self.held = 0

    def memory_mib(self):
        self.asked += 1
        return float(self.asked)

    resident_mib = memory_mib

    def holdings(self):
        self.held += 1
        return HELD


def attacked(answer, count=60, seed=3):
    process, progress = Process(), []

    async def run():
        async def speak(reader, writer):
            asked = await reader.read(2**16)
            if asked.startswith(b"GET /metrics HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n"):
                answered = b"HTTP/1.1 200 OK\r\n\r\nsana_active 0.0\nsana_queued 0.0\n"
            else:
                answered = answer
            writer.write(answered)
            writer.close()

        server = await asyncio.start_server(speak, "127.0.0.1", 0)
        async with server:
            target = Target(*server.sockets[0].getsockname())
            return await attack(target, process, count, seed, progress.append)

    return asyncio.run(run()), process, progress


def test_every_request_is_sent_counted_and_read():
    found, process, progress = attacked(b"HTTP/1.1 500 X\r\nContent-Length: 3\r\n\r\n/tm")
    assert found["requests"] == sum(progress) == 60 and process.held == 2 and found["healthy_after"] is False
    answered = sum(counts.get("500", 0) for counts in found["statuses"].values())
    assert found["server_errors"] == answered > 40
    assert sum(found["wrong_errors"].values()) > 40 and found["memory"]["flat"] is None
    assert [done for done, _ in found["memory_mib"]] == sorted(done for done, _ in found["memory_mib"])


def test_good_answers_are_no_reason_to_complain_and_a_seed_repeats_the_requests():
    one, other = (attacked(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")[0] for _ in range(2))
    assert one["server_errors"] == 0 and one["wrong_errors"] == {} and one["healthy_after"] is True
    totals = [{name: sum(counts.values()) > 0 for name, counts in run["statuses"].items()} for run in (one, other)]
    assert totals[0] == totals[1]
