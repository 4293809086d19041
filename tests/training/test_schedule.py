"""Warm-up, cosine, and the two bounds of a run."""

import pytest

from sana.training.schedule import Progress, lr_factor


def test_warm_up_rises_and_cosine_falls_to_zero():
    assert lr_factor(0, 0.0, warmup_steps=10) == pytest.approx(0.1)
    assert lr_factor(100, 0.5, warmup_steps=10) == pytest.approx(0.5)
    assert lr_factor(100, 1.0, warmup_steps=10) == pytest.approx(0.0)


def test_fraction_follows_the_tighter_bound():
    assert Progress(100, step=25).fraction == pytest.approx(0.25)
    assert Progress(100, minutes=1, step=25, seconds=30).fraction == pytest.approx(0.5, abs=0.01)
    assert Progress(100, minutes=1, step=25, seconds=600).fraction == 1.0
