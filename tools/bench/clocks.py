"""What a run takes: seconds on the clock, of all cores and of a GPU, and the greatest memory. `harness.py` compares."""

import resource
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

FLUSH_BYTES = 2**30
FLUSHED_RUNS = 20  # of a kernel in one round; their median is the round's time


@dataclass(frozen=True)
class Sample:
    """Seconds of one run: on the clock, of all cores together, and of the GPU (0 without one)."""

    wall: float
    cpu: float
    gpu: float = 0.0

    def plus(self, other: "Sample", share: float) -> "Sample":
        return Sample(self.wall + other.wall * share, self.cpu + other.cpu * share, self.gpu + other.gpu * share)


class Stopwatch(Protocol):
    """Runs something and says what it took."""

    def __call__(self, run: Callable[[], Any], repeats: int = 1) -> Sample: ...


class CpuStopwatch:
    """Time on the clock, and process time, which a busy machine disturbs less.

    Args:
        wall: returns seconds.
        cpu: returns seconds of all threads together.
    """

    def __init__(
        self, wall: Callable[[], float] = time.perf_counter, cpu: Callable[[], float] = time.process_time
    ) -> None:
        self._wall, self._cpu = wall, cpu

    def __call__(self, run: Callable[[], Any], repeats: int = 1) -> Sample:
        wall, cpu = self._wall(), self._cpu()
        for _ in range(repeats):
            run()
        return Sample((self._wall() - wall) / repeats, (self._cpu() - cpu) / repeats)


class CudaStopwatch:
    """Time from an idle device to an idle device, and between two events around the work."""

    def __call__(self, run: Callable[[], Any], repeats: int = 1) -> Sample:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return Sample(wall / repeats, cpu / repeats, begin.elapsed_time(end) / 1000 / repeats)


class KernelStopwatch:
    """The median of several runs between CUDA events, each with a second-level cache that holds other data.

    Overwriting far more than the cache takes the device longer than the host needs to queue the next run, so short work
    is not measured as the time of its launch.
    """

    def __init__(self) -> None:
        self._other = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self, run: Callable[[], Any], repeats: int = FLUSHED_RUNS) -> Sample:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        torch.cuda.synchronize()
        cpu = time.process_time()
        for begin, end in events:
            self._other.zero_()
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize()
        cpu = (time.process_time() - cpu) / repeats
        seconds = statistics.median(begin.elapsed_time(end) for begin, end in events) / 1000
        return Sample(seconds, cpu, seconds)


def reset_peak(device: str) -> None:
    """Begins to watch the greatest memory anew: of the GPU, or where Linux lets us the resident memory."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):  # not Linux, or not allowed: the greatest of the whole process is reported
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str) -> int:
    """The greatest memory since `reset_peak`: allocated on the GPU, or resident."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    with suppress(OSError, ValueError, IndexError):
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
