"""The estimate of waiting times, on numbers that can be checked by hand."""

import pytest

from sana.serving.throughput import FIRST_GUESS, LONGEST_WAIT, Throughput


def test_nothing_is_known_before_the_first_picture():
    assert Throughput().rate is None
    assert Throughput().wait(1e9) == FIRST_GUESS


def test_a_steady_rate_is_found_and_idle_time_does_not_count():
    found, now = Throughput(), 100.0
    for _ in range(5):
        found.busy(now)
        now += 2.0
        found.done(10.0, now)
        found.idle()
        now += 1000.0
    assert found.rate == pytest.approx(5.0)
    assert found.wait(50.0) == 10


def test_pictures_that_finish_together_count_together():
    found = Throughput()
    found.busy(0.0)
    for _ in range(4):
        found.done(10.0, 8.0)
    assert found.rate == pytest.approx((0.9**3 + 0.9**2 + 0.9 + 1) * 10 / (0.9**3 * 8))


def test_waits_are_whole_seconds_between_one_and_an_hour():
    found = Throughput()
    found.busy(0.0)
    found.done(1.0, 1.0)
    assert (found.wait(0.0), found.wait(1.5), found.wait(1e12)) == (1, 2, LONGEST_WAIT)
