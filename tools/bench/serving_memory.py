"""Whether a server's process stays as large as it is under hostile requests: the measure, and the verdict.

Memory is what is not backed by files (RssAnon): pages of libraries come and go with other processes. The first part of
the requests is warm-up: bounded caches (kernels by shape, words by text) fill. After it two things must hold.
- Memory under load may rise and fall, but must not drift: the increments between the means of equal blocks of requests
  must have a mean that is statistically zero (Student's t, one-sided, 1 %).
- What is exact, at a quiet moment after the warm-up and at the end, must be the same: asyncio's tasks, threads and open
  files; Python's objects and memory blocks, malloc's bytes in use and memory at rest within what a small leak of every
  request would exceed. At rest means after free pages were given back, as an idle server does.
"""

import itertools
import json
import math
import os
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WARM_UP = 0.3  # of the requests
BLOCKS = 20  # into which the rest is cut
T_99 = 2.552  # of Student's distribution with BLOCKS - 2 degrees of freedom, one-sided
CEILING_MIB = 32.0  # between the means of the two halves after the warm-up, however few steps that took
ENOUGH_REQUESTS = 3000  # after the warm-up; with fewer there is no verdict
MOST_A_REQUEST = {"objects": 0.02, "blocks": 0.5, "native_bytes": 512.0, "rest_mib": 0.001}
SAME = ("tasks", "threads", "files")  # that may not be more at the end


class Watched:
    """A process of `watched_server.py`.

    Args:
        process: with pipes for its standard input and output, whose first line was read.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def memory_mib(self) -> float:
        """Memory in RAM that is not backed by files."""
        return _status(self.process.pid, "RssAnon") / 1024

    def resident_mib(self) -> float:
        """Memory in RAM."""
        return _status(self.process.pid, "VmRSS") / 1024

    def holdings(self) -> dict[str, Any]:
        """What the process says that it holds, its threads, its open files, and its memory at rest."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("?\n")
        self.process.stdin.flush()
        told: dict[str, Any] = json.loads(self.process.stdout.readline())
        files = len(os.listdir(f"/proc/{self.process.pid}/fd"))
        threads = _status(self.process.pid, "Threads")
        return {**told, "threads": threads, "files": files, "rest_mib": self.memory_mib()}


def _status(pid: int, field: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def drift(values: Sequence[float], requests: int) -> dict[str, float]:
    """Judges memory after the warm-up.

    Args:
        values: MiB, the mean of each block, at least three.
        requests: in each block.

    Returns:
        halves_mib: mean of the second half less that of the first.
        per_1000_mib: mean increment, for 1000 requests, and per_1000_error_mib: its standard error.
        t: their ratio, 0 where nothing changed at all.
    """
    steps = [after - before for before, after in itertools.pairwise(values)]
    mean, error = statistics.fmean(steps), statistics.stdev(steps) / math.sqrt(len(steps))
    middle = len(values) // 2
    return {
        "halves_mib": statistics.fmean(values[-middle:]) - statistics.fmean(values[:middle]),
        "per_1000_mib": 1000 * mean / requests,
        "per_1000_error_mib": 1000 * error / requests,
        "t": mean / error if error else math.copysign(math.inf, mean) if mean else 0.0,
    }


def blocks(samples: Sequence[tuple[int, float]], count: int) -> list[float]:
    """Returns the mean of each block after the warm-up.

    Args:
        samples: (requests, MiB), rising; at least one in every block.
        count: of requests.
    """
    first, size = WARM_UP * count, (1 - WARM_UP) * count / BLOCKS
    found: list[list[float]] = [[] for _ in range(BLOCKS)]
    for done, mib in samples:
        if done > first:
            found[min(BLOCKS - 1, int((done - first) / size))].append(mib)
    return [statistics.fmean(one) for one in found]


def judge(samples: Sequence[tuple[int, float]], count: int, held: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns numbers and verdict.

    Args:
        samples: (requests, MiB) of all requests.
        count: of requests.
        held: `Watched.holdings` after the warm-up and at the end.

    Returns:
        What `drift` returns, `held_before` and `held_after`, `reasons` (what speaks against it), and `flat`: whether
        there is none; None where there were too few requests for a verdict.
    """
    requests = round((1 - WARM_UP) * count)
    found = drift(blocks(samples, count), requests // BLOCKS)
    before, after = held
    reasons = []
    if found["t"] > T_99:
        reasons.append(f"memory drifts by {found['per_1000_mib']:+.2f} MiB every 1000 requests (t = {found['t']:.1f})")
    if found["halves_mib"] > CEILING_MIB:
        reasons.append(f"memory grew by {found['halves_mib']:.1f} MiB from half to half after the warm-up")
    for name, most in MOST_A_REQUEST.items():
        if before[name] is not None and after[name] - before[name] > most * requests:
            reasons.append(f"{name} grew by {after[name] - before[name]:g} in {requests} requests")
    reasons += [f"{name}: {before[name]} before, {after[name]} after" for name in SAME if after[name] > before[name]]
    flat = not reasons if requests >= ENOUGH_REQUESTS else None
    return {**found, "held_before": before, "held_after": after, "reasons": reasons, "flat": flat}
