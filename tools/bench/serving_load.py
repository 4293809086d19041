"""Clients that each ask for one picture after another: throughput and latency. Hostile ones are in `hostile.py`."""

import asyncio
import collections
import json
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

from tools.bench.hostile import Target, exchange, posted

ENOUGH = 20  # latencies below which no percentile beyond the median is told


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many percent do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


async def load(target: Target, clients: int, seconds: float, wish: dict[str, Any]) -> dict[str, Any]:
    """Lets clients ask for pictures.

    Args:
        target: the server.
        clients: that ask at a time, each as soon as it has its last picture.
        seconds: after which no client asks again; what is asked for is waited for, and counts.
        wish: what is asked for; every request has a seed of its own.

    Returns:
        clients, pictures, seconds (of all), a_second, p50, p95, p99 (None of too few) and failures by status.
    """
    latencies: list[float] = []
    failures: collections.Counter[str] = collections.Counter()
    started = time.monotonic()

    async def client(number: int) -> None:
        turn = 0
        while not turn or time.monotonic() - started < seconds:
            body = json.dumps(wish | {"seed": number * 10_000 + turn}).encode()
            began = time.monotonic()
            try:
                status, answer = await exchange(target, posted(body))
            except TimeoutError:
                status, answer = 0, b""
            if status == 200 and b"b64_json" in answer:
                latencies.append(time.monotonic() - began)
            else:
                failures[str(status)] += 1
            turn += 1

    await asyncio.gather(*(client(number) for number in range(clients)))
    took = time.monotonic() - started
    told = {"clients": clients, "pictures": len(latencies), "seconds": took, "a_second": len(latencies) / took}
    if latencies:
        told["p50"] = statistics.median(latencies)
        enough = len(latencies) >= ENOUGH
        told |= {f"p{one}": percentile(latencies, one) if enough else None for one in (95, 99)}
    return told | {"failures": dict(failures)}
