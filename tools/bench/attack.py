"""Sends hostile requests to a watched server, reads every answer, follows its memory. The requests: `hostile.py`."""

import asyncio
import collections
import random
import time
from collections.abc import Callable
from typing import Any

from tools.bench.hostile import KINDS, Target, complaint, draw, exchange, head
from tools.bench.serving_memory import WARM_UP, Watched, judge

AT_ONCE = 16
SAMPLES = 200  # of memory
ALLOWED_5XX = (501, 503)  # not there yet; too many connections


async def attack(
    target: Target, watched: Watched, count: int, seed: int, progress: Callable[[int], object] = lambda _: None
) -> dict[str, Any]:
    """Sends so many requests, drawn by their shares from `seed`.

    Args:
        target: where to.
        watched: the server's process.
        count: number of requests.
        seed: the same one draws the same requests.
        progress: called with the number of requests just done.

    Returns:
        What was answered to each kind, what was wrong, the memory's samples and the verdict of `judge`.
    """
    rng = random.Random(seed)
    drawn = [(draw(rng), rng.randrange(2**32)) for _ in range(count)]
    statuses: dict[str, collections.Counter[int]] = {name: collections.Counter() for name in KINDS}
    wrong: collections.Counter[str] = collections.Counter()
    samples, held = [(0, watched.memory_mib())], []
    done = hanging = 0
    started = time.monotonic()

    async def enemy(coming: Any) -> None:
        nonlocal done, hanging
        for name, own_seed in coming:
            try:
                for status, body in await KINDS[name][0](target, random.Random(own_seed)):
                    statuses[name][status] += 1
                    said = complaint(status, body)
                    wrong.update([f"{name}: {said}"] if said else [])
            except TimeoutError:
                hanging += 1
            except OSError:  # not even a connection: the server is full, or gone, which is asked at the end
                statuses[name][0] += 1
            done += 1
            progress(1)
            if done % max(1, count // SAMPLES) == 0:
                samples.append((done, watched.memory_mib()))

    for part in (drawn[: int(WARM_UP * count)], drawn[int(WARM_UP * count) :]):
        coming = iter(part)
        await asyncio.gather(*(enemy(coming) for _ in range(AT_ONCE)))
        await quiet(target)
        samples.append((done, watched.memory_mib()))
        held.append(watched.holdings())
    status, _ = await exchange(target, head("GET", "/health"))
    return {
        "requests": done, "seed": seed, "seconds": time.monotonic() - started, "hanging": hanging,
        "server_errors": sum(number for counts in statuses.values() for code, number in counts.items()
                             if code >= 500 and code not in ALLOWED_5XX),
        "wrong_errors": dict(wrong), "healthy_after": status == 200, "resident_mib": watched.resident_mib(),
        "memory_mib": samples, "memory": judge(samples, count, held),
        "statuses": {name: {str(code): number for code, number in sorted(counts.items())}
                     for name, counts in statuses.items()},
    }  # fmt: skip


async def quiet(target: Target) -> None:
    """Waits until nothing waits or is in work: what leavers asked for is given up between steps."""
    while True:
        _, page = await exchange(target, head("GET", "/metrics"))
        if b"sana_active 0.0" in page and b"sana_queued 0.0" in page:
            return
