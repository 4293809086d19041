"""The harness of the benchmarks: order of runs, statistics on a fake clock, failing checks, deadlines, errors."""

import contextlib
import math
import mmap
import time

import pytest
import torch

from tools.bench.clocks import CpuStopwatch, Sample, peak_bytes, reset_peak
from tools.bench.harness import (
    Case,
    Comparison,
    Deadline,
    DeadlineError,
    Side,
    Skip,
    compare,
    limit,
    measure,
    rms_ratio,
    run_case,
)  # fmt: skip
from tools.bench.results import CaseResult, Check, Timing

GOOD, BAD = Check(1e-7, 1e-5), Check(1e-3, 1e-5)


class FakeClock:
    """Time passes only when something says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def takes(self, *seconds):
        """Returns a run that takes the given times in turn, beginning with the warm-up."""
        times = iter(seconds)

        def run():
            self.now += next(times)

        return run


def check_of(**checks):
    return lambda: checks


def forever(order, name):
    return Side(name, lambda: order.append(name))


def test_sides_run_in_turn_after_the_check_and_one_warm_up_each():
    order = []

    def check():
        order.append("check")
        return {"b": GOOD}

    comparison = Comparison([forever(order, "a"), forever(order, "b")], check)
    _, timings, remark = measure(comparison, 3)
    assert order == ["check", "a", "b", "a", "b", "a", "b", "a", "b"]
    assert [len(timing.wall) for timing in timings.values()] == [3, 3]
    assert remark == ""


def test_times_ratios_and_medians_are_those_of_the_clock():
    clock = FakeClock()
    ours = Side("ours", clock.takes(9, 1, 2, 4))
    theirs = Side("diffusers", clock.takes(9, 3, 4, 16))
    watch = CpuStopwatch(wall=clock, cpu=lambda: 2 * clock())
    _, timings, _ = measure(Comparison([ours, theirs], check_of(diffusers=GOOD)), 3, stopwatch=watch)
    assert timings["ours"].wall == [1, 2, 4]
    assert timings["diffusers"].cpu == [6, 8, 32]
    result = CaseResult("part", "case", "", "measured", timings=timings)
    assert result.ratios("diffusers") == [3, 2, 4]
    assert result.ratio("diffusers") == 3  # the median of the ratios; that of the times would give 4 / 2
    assert result.ratio("diffusers", "cpu") == 3
    content = result.to_dict()
    assert content["timings"]["ours"]["median"] == 2
    assert content["timings"]["ours"]["quartiles"] == [1.5, 3]


def test_what_is_done_once_in_many_runs_counts_by_its_share():
    clock = FakeClock()
    side = Side("ours", clock.takes(1, 1, 1), once=clock.takes(50, 40, 20), runs_per_once=20)
    _, timings, _ = measure(Comparison([side], check_of()), 2, stopwatch=CpuStopwatch(clock, clock))
    assert timings["ours"].wall == [1 + 40 / 20, 1 + 20 / 20]


def test_short_work_is_repeated_within_a_round():
    clock = FakeClock()
    runs = []

    def run():
        runs.append(clock.now)
        clock.now += 0.25

    comparison = Comparison([Side("ours", run)], check_of(), kernels=True, least_seconds=1.0)
    _, timings, _ = measure(comparison, 2, stopwatch=CpuStopwatch(clock, clock))
    assert len(runs) == 1 + 1 + 2 * 4
    assert timings["ours"].wall == [0.25, 0.25]


@pytest.mark.parametrize("check", [BAD, Check(math.nan, 1e-5)])
def test_a_comparison_whose_check_fails_is_not_timed(check):
    ran = []
    case = Case("part", "case", lambda: Comparison([forever(ran, "ours"), forever(ran, "b")], check_of(b=check)))
    result = run_case(case, 3, Deadline(60))
    assert ran == []
    assert (result.status, result.timings) == ("failed", {})
    assert "not timed" in result.reason and "b" in result.reason
    assert result.checks["b"] is check


def test_a_case_that_does_not_fit_any_more_is_skipped_unbuilt():
    clock = FakeClock()
    deadline = Deadline(100, clock)
    clock.now = 95
    case = Case("part", "case", lambda: pytest.fail("built"), seconds=20)
    result = run_case(case, 3, deadline)
    assert result.status == "skipped"
    assert result.reason == "needs about 20 s, and 5 s were left"


def test_rounds_end_when_the_next_would_not_fit():
    clock = FakeClock()
    side = Side("ours", lambda: setattr(clock, "now", clock.now + 10))
    left = Deadline(60, clock).left
    _, timings, remark = measure(Comparison([side], check_of()), 50, stopwatch=CpuStopwatch(clock, clock), left=left)
    assert 2 <= len(timings["ours"].wall) <= 5
    assert remark == f"{len(timings['ours'].wall)} of 50 rounds: no time for more"


def test_a_round_that_was_begun_and_stopped_does_not_count():
    runs = []

    def run():
        runs.append(0)
        if len(runs) == 4:  # warm-up, two rounds, and this one
            raise DeadlineError

    _, timings, _ = measure(Comparison([Side("a", lambda: None), Side("b", run)], check_of()), 5)
    assert [len(timing.wall) for timing in timings.values()] == [2, 2]


def test_a_case_that_takes_too_long_is_stopped_and_named():
    def build():
        while True:  # an error of a library must not swallow the stop
            with contextlib.suppress(Exception):
                sum(range(1000))

    result = run_case(Case("part", "case", build, limit=0.05), 3, Deadline(60))
    assert result.status == "skipped"
    assert "took longer" in result.reason


def test_the_limit_ends_with_its_block():
    with limit(0.01):
        pass
    end = time.monotonic() + 0.02
    while time.monotonic() < end:  # a timer that was left behind would go off here
        sum(range(100))


def test_errors_and_skips_are_told_by_name():
    def fail():
        raise KeyError("blocks.0")

    def skip():
        raise Skip("diffusers is not installed")

    broken, left_out = (run_case(Case("part", "case", build), 3, Deadline(60)) for build in (fail, skip))
    assert (broken.status, broken.reason) == ("failed", "KeyError: 'blocks.0'")
    assert (left_out.status, left_out.reason) == ("skipped", "diffusers is not installed")
    with pytest.raises(KeyError):
        run_case(Case("part", "case", fail), 3, Deadline(60), strict=True)


def test_how_far_results_are_apart():
    expected = torch.tensor([3.0, 4.0])
    assert rms_ratio(expected + torch.tensor([0.03, 0.04]), expected) == pytest.approx(0.01)
    assert math.isnan(rms_ratio(torch.zeros(3), torch.zeros(1, 3)))
    assert not compare(torch.full((2,), math.nan), expected).passed
    assert compare(expected * (1 + 1e-6), expected).passed and not compare(expected * (1 + 1e-4), expected).passed


def test_sixteen_bits_are_judged_by_the_other_sides_own_error():
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    rough = (exact * 1.01).bfloat16()  # an error of 1e-2
    assert compare(exact.bfloat16(), rough, exact).passed
    far = (exact * 1.05).bfloat16()
    assert not compare(far, exact.bfloat16(), exact).passed
    assert compare(far, exact.bfloat16(), exact).tolerance == pytest.approx(5e-3)
    wrong = (exact * 3).bfloat16()  # nothing is excused by a side that is wrong itself
    assert not compare(exact.bfloat16(), wrong, exact).passed


def test_samples_add_by_their_share():
    assert Sample(1, 2, 3).plus(Sample(20, 40, 60), 1 / 20) == Sample(2, 4, 6)


def test_the_peak_of_memory_sees_what_was_freed():
    reset_peak("cpu")
    before = peak_bytes("cpu")
    with mmap.mmap(-1, 64 * 2**20) as fresh:  # not through malloc, which may reuse what it kept
        fresh.write(bytes(64 * 2**20))
    assert peak_bytes("cpu") >= before + 32 * 2**20


def test_a_side_may_know_its_own_peak():
    comparison = Comparison([Side("ours", lambda: None, peak=iter([5, 9, 7]).__next__)], check_of())
    _, timings, _ = measure(comparison, 3)
    assert timings["ours"].peak_bytes == 9


def test_a_timing_without_visible_process_time_has_ratio_one():
    timings = {"ours": Timing([1.0], [0.0]), "b": Timing([2.0], [0.0])}
    assert CaseResult("part", "case", "", "measured", timings=timings).ratio("b", "cpu") == 1.0
