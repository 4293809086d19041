"""Compares results, then times the sides of a comparison in interleaved rounds. Which comparisons: the parts' files."""

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from tools.bench.clocks import (
    FLUSHED_RUNS,
    CpuStopwatch,
    CudaStopwatch,
    KernelStopwatch,
    Sample,
    Stopwatch,
    peak_bytes,
    reset_peak,
)
from tools.bench.results import CaseResult, Check, Timing

MIN_ROUNDS = 2
MOST = 5e-2
# RMS ratio that two results of one dtype may differ by; 16-bit ones by more where diffusers' own error is larger.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}


class DeadlineError(BaseException):
    """The time of a case is up. No `Exception`, so that no library takes it for an error of its own."""


class Skip(RuntimeError):  # noqa: N818  it is no error
    """A case cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Side:
    """One way of doing a piece of work.

    Attributes:
        name: such as "ours" or "diffusers".
        run: does it once.
        once: what is done once in `runs_per_once` runs, such as filling a cache; its share counts in every run.
        runs_per_once: see `once`.
        peak: bytes of the last run, where the run itself knows better than `peak_bytes`.
    """

    name: str
    run: Callable[[], Any]
    once: Callable[[], Any] | None = None
    runs_per_once: int = 1
    peak: Callable[[], int] | None = None


@dataclass(frozen=True)
class Work:
    """What one run does at the least: bytes that must be moved, floating-point operations (2 x MAC), images made."""

    bytes: float = 0.0
    flops: float = 0.0
    images: float = 0.0


@dataclass
class Comparison:
    """A case that is ready to run.

    Attributes:
        sides: the first is ours; the ratios are those of the others to it.
        check: computes, for the sides that must give the same result as ours, how far they are from it.
        device: "cpu" or "cuda".
        kernels: the work is a few kernels: timed by CUDA events with a flushed cache, or on a CPU repeated until
            `least_seconds` have passed.
        least_seconds: see `kernels`.
        work: of one run.
        facts: what the reader should know, such as shapes.
        stopwatch: None for the one that fits the device and the size of the work.
        warm_up: whether each side runs once untimed.
    """

    sides: Sequence[Side]
    check: Callable[[], Mapping[str, Check]]
    device: str = "cpu"
    kernels: bool = False
    least_seconds: float = 0.05
    work: Work = field(default_factory=Work)
    facts: dict[str, Any] = field(default_factory=dict)
    stopwatch: Stopwatch | None = None
    warm_up: bool = True


@dataclass(frozen=True)
class Case:
    """One line of the tables.

    Attributes:
        part: name of the part it belongs to.
        name: what is measured, with every reduction said.
        build: makes what is compared; raises `Skip` with the reason where that cannot be had.
        seconds: it is not begun with less time left.
        limit: it is stopped after so many seconds.
        rounds: at most; None for the suite's number.
        key: how the table of targets finds it.
    """

    part: str
    name: str
    build: Callable[[], Comparison]
    seconds: float = 1.0
    limit: float = math.inf
    rounds: int | None = None
    key: str = ""


class Deadline:
    """How much of a budget is left.

    Args:
        seconds: the budget.
        clock: returns seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds

    def left(self) -> float:
        """Seconds that are left; negative ones are over."""
        return self._end - self._clock()


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    """RMS(actual - expected) / RMS(expected) in float64; NaN where shapes differ, so that no limit accepts it."""
    if actual.shape != expected.shape:
        return math.nan
    actual, expected = actual.detach().double().flatten(), expected.detach().double().flatten().to(actual.device)
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def compare(
    actual: Tensor,
    expected: Tensor,
    exact: Tensor | None = None,
    tolerance: float | None = None,
    most: float = MOST,
) -> Check:
    """How far our result is from another one.

    Args:
        actual: ours.
        expected: the other side's.
        exact: the same in float32, for results of 16 bits. Rounding alone can exceed the table then: two results may
            differ by twice the other side's own distance from it.
        tolerance: instead of the table's for the dtype of `actual`.
        most: that `exact` may raise the tolerance to; more is no rounding.
    """
    allowed = TOLERANCE.get(actual.dtype, 1e-5) if tolerance is None else tolerance
    ratio = rms_ratio(actual, expected)
    if exact is None:
        return Check(ratio, allowed)
    ours, theirs = rms_ratio(actual, exact), rms_ratio(expected, exact)
    return Check(
        ratio,
        min(max(allowed, 2 * theirs), max(allowed, most)),
        f"from the float32 result: ours {ours:.1e}, theirs {theirs:.1e}",
    )


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raises DeadlineError in the main thread when `seconds` have passed."""
    if math.isinf(seconds):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise DeadlineError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def stopwatch_of(comparison: Comparison) -> Stopwatch:
    """The stopwatch that fits the device and the size of the work."""
    if comparison.stopwatch is not None:
        return comparison.stopwatch
    if comparison.device == "cpu":
        return CpuStopwatch()
    return KernelStopwatch() if comparison.kernels else CudaStopwatch()


def measure(
    comparison: Comparison,
    rounds: int,
    *,
    stopwatch: Stopwatch | None = None,
    left: Callable[[], float] = lambda: math.inf,
) -> tuple[dict[str, Check], dict[str, Timing], str]:
    """Compares the results, and if all are alike times the sides: A, B, A, B, ...

    Args:
        comparison: what to run.
        rounds: of all sides.
        stopwatch: measures one run; None for the one that fits.
        left: seconds that are left; no round is begun that will not fit, once `MIN_ROUNDS` are done.

    Returns:
        Checks by the other side's name; timings by side's name, empty where a check failed; a remark, or "".

    Raises:
        DeadlineError: the time was up before `MIN_ROUNDS` rounds.
    """
    checks = dict(comparison.check())
    if not all(check.passed for check in checks.values()):
        return checks, {}, ""
    stopwatch = stopwatch or stopwatch_of(comparison)
    repeats = {side.name: _warm_up(comparison, side, stopwatch) for side in comparison.sides}
    samples: dict[str, list[Sample]] = {side.name: [] for side in comparison.sides}
    peaks = dict.fromkeys(samples, 0)
    done = 0
    with suppress(DeadlineError):  # complete rounds count
        for number in range(rounds):
            took = sum(sample.wall * repeats[name] for name, all_ in samples.items() for sample in all_[-1:])
            if number >= MIN_ROUNDS and left() < 1.5 * took:
                break
            for side in comparison.sides:
                reset_peak(comparison.device)
                samples[side.name].append(_time(side, stopwatch, repeats[side.name]))
                peak = side.peak() if side.peak is not None else peak_bytes(comparison.device)
                peaks[side.name] = max(peaks[side.name], peak)
            done = number + 1
    if done < min(MIN_ROUNDS, rounds):
        raise DeadlineError
    clock = "CUDA events" if comparison.device != "cpu" and comparison.kernels else "wall"
    timings = {
        name: Timing(
            wall=[sample.wall for sample in all_[:done]],
            cpu=[sample.cpu for sample in all_[:done]],
            gpu=[sample.gpu for sample in all_[:done]] if comparison.device != "cpu" else [],
            peak_bytes=peaks[name],
            clock=clock,
        )
        for name, all_ in samples.items()
    }
    return checks, timings, f"{done} of {rounds} rounds: no time for more" if done < rounds else ""


def run_case(case: Case, rounds: int, deadline: Deadline, *, strict: bool = False) -> CaseResult:
    """Builds, checks and measures a case; whatever goes wrong is told in the result.

    Args:
        case: what to measure.
        rounds: where the case itself names no number.
        deadline: of the whole suite.
        strict: errors are raised instead.
    """

    def result(status: str, reason: str = "", **found: Any) -> CaseResult:
        return CaseResult(case.part, case.name, case.key, status, reason, **found)

    left = deadline.left()
    if left < case.seconds:
        return result("skipped", f"needs about {case.seconds:.0f} s, and {max(left, 0.0):.0f} s were left")
    own = Deadline(min(case.limit, left))
    try:
        with limit(own.left()):
            comparison = case.build()
            checks, timings, remark = measure(comparison, min(rounds, case.rounds or rounds), left=own.left)
    except DeadlineError:
        return result("skipped", f"took longer than the {min(case.limit, left):.0f} s that it was given")
    except Skip as error:
        return result("skipped", str(error))
    except Exception as error:  # one broken case must not cost the others
        if strict:
            raise
        return result("failed", f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}")
    work, facts = comparison.work, comparison.facts
    found = {"checks": checks, "facts": facts, "bytes": work.bytes, "flops": work.flops, "images": work.images}
    if not timings:
        bad = ", ".join(f"{name} {check.rms_ratio:.1e} > {check.tolerance:.0e}" for name, check in checks.items()
                        if not check.passed)  # fmt: skip
        return result("failed", f"not timed: the results differ (RMS ratio: {bad})", **found)
    return result("measured", remark, timings=timings, **found)


def _warm_up(comparison: Comparison, side: Side, stopwatch: Stopwatch) -> int:
    """Runs a side once untimed, and where the work is small once more; returns how many runs make one sample."""
    if not comparison.warm_up:
        return 1
    if side.once is not None:
        side.once()
    side.run()
    if not comparison.kernels:
        return 1
    if comparison.device != "cpu":
        return FLUSHED_RUNS
    return max(1, math.ceil(comparison.least_seconds / max(stopwatch(side.run, 1).wall, 1e-7)))


def _time(side: Side, stopwatch: Stopwatch, repeats: int) -> Sample:
    share = None if side.once is None else stopwatch(side.once, 1)
    sample = stopwatch(side.run, repeats)
    return sample if share is None else sample.plus(share, 1 / side.runs_per_once)
