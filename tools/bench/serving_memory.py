"""Whether a server's process stays as large as it is under hostile requests: the measure, and the verdict.

Memory is what is not backed by files (RssAnon): pages of libraries come and go with other processes. The first part of
the requests is warm-up: heaps and bounded caches (kernels by shape, words by text) fill. After it memory may take a
step now and then, since allocators take pages in lots, but must not drift: the increments over equal blocks of requests
must have a mean that is statistically zero (Student's t, one-sided, 1 %). Beside it stands what is exact: objects,
blocks and bytes in use, tasks, threads and open files, each at a quiet moment after the warm-up and at the end.
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
T_99 = 2.539  # of Student's distribution with BLOCKS - 1 degrees of freedom, one-sided
CEILING_MIB = 8.0  # of growth after the warm-up, however few steps it took
ENOUGH_REQUESTS = 1000  # after the warm-up; with fewer there is no verdict
MOST_A_REQUEST = {"objects": 0.02, "blocks": 0.5, "native_bytes": 512.0}  # a leak of every request would be more
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
        """What the process says that it holds, its threads and open files."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("?\n")
        self.process.stdin.flush()
        told: dict[str, Any] = json.loads(self.process.stdout.readline())
        files = len(os.listdir(f"/proc/{self.process.pid}/fd"))
        return {**told, "threads": _status(self.process.pid, "Threads"), "files": files}


def _status(pid: int, field: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def drift(samples: Sequence[tuple[int, float]]) -> dict[str, float]:
    """Judges samples (requests, MiB) after the warm-up, taken at equal distances.

    Returns:
        growth_mib: from the first to the last.
        halves_mib: mean of the second half less that of the first.
        per_1000_mib: mean increment, for 1000 requests, and per_1000_error_mib: its standard error.
        t: their ratio, 0 where nothing changed at all.

    Raises:
        ValueError: there are fewer than three samples.
    """
    if len(samples) < 3:
        raise ValueError("A drift needs three samples.")
    values = [mib for _, mib in samples]
    steps = [after - before for before, after in itertools.pairwise(values)]
    mean, error = statistics.fmean(steps), statistics.stdev(steps) / math.sqrt(len(steps))
    scale = 1000 * len(steps) / (samples[-1][0] - samples[0][0])
    middle = len(values) // 2
    return {
        "growth_mib": values[-1] - values[0],
        "halves_mib": statistics.fmean(values[middle:]) - statistics.fmean(values[:middle]),
        "per_1000_mib": mean * scale,
        "per_1000_error_mib": error * scale,
        "t": mean / error if error else math.copysign(math.inf, mean) if mean else 0.0,
    }


def blocks(samples: Sequence[tuple[int, float]], count: int) -> list[tuple[int, float]]:
    """Returns the sample at the end of the warm-up and at the end of each block of the rest.

    Args:
        samples: (requests, MiB), rising.
        count: of requests.
    """
    first = WARM_UP * count
    ends = [first + (count - first) * index / BLOCKS for index in range(BLOCKS + 1)]
    return [next(one for one in samples if one[0] >= math.floor(end)) for end in ends]


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
    measured = blocks(samples, count)
    found = drift(measured)
    before, after = held
    requests = measured[-1][0] - measured[0][0]
    reasons = []
    if found["t"] > T_99:
        reasons.append(f"memory drifts by {found['per_1000_mib']:+.2f} MiB every 1000 requests (t = {found['t']:.1f})")
    if found["growth_mib"] > CEILING_MIB:
        reasons.append(f"memory grew by {found['growth_mib']:.1f} MiB after the warm-up")
    for name, most in MOST_A_REQUEST.items():
        if before[name] is not None and after[name] - before[name] > most * requests:
            reasons.append(f"{name} grew by {after[name] - before[name]} in {requests} requests")
    reasons += [f"{name}: {before[name]} before, {after[name]} after" for name in SAME if after[name] > before[name]]
    flat = not reasons if requests >= ENOUGH_REQUESTS else None
    return {**found, "held_before": before, "held_after": after, "reasons": reasons, "flat": flat}
