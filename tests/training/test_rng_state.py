"""Every random stream goes on bitwise after a restore, also through a file."""

import random

import numpy as np
import pytest
import torch

from sana.training import rng_state
from sana.training.train_state import load_train_state, save_train_state


def draws():
    values = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]
    values += [torch.rand(()).item(), torch.randn(17).sum().item()]
    if torch.cuda.is_available():
        values += [torch.rand((), device=f"cuda:{i}").item() for i in range(torch.cuda.device_count())]
    return values


@pytest.mark.parametrize("warm", range(3))  # normal generators keep a second value in store: odd and even counts
def test_streams_go_on_bitwise(tmp_path, warm):
    random.seed(warm), np.random.seed(warm), torch.manual_seed(warm)
    for _ in range(warm):
        draws(), random.gauss(0, 1), np.random.randn()
    save_train_state(tmp_path / "rng.pt", rng_state.capture())
    expected = [draws() for _ in range(700)]  # past the 624 words of a Mersenne twister
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    assert draws() != expected[0]
    rng_state.restore(load_train_state(tmp_path / "rng.pt"))
    assert [draws() for _ in range(700)] == expected


def test_a_capture_is_not_moved_by_later_draws():
    state = rng_state.capture()
    first = draws()
    draws()
    rng_state.restore(state)
    assert draws() == first


def test_other_devices_are_logged_and_left_alone(caplog):
    state = rng_state.capture()
    state["cuda"] = [*state["cuda"], torch.get_rng_state()]
    rng_state.restore(state)
    assert "CUDA devices was saved" in caplog.text


@pytest.mark.parametrize("broken", [{}, {"python": 3}, {"python": (3, (1,), None), "numpy": ("MT19937", 5)}])
def test_a_broken_state_is_refused_before_anything_changes(broken):
    state = rng_state.capture()
    with pytest.raises(ValueError, match="no state of random generators"):
        rng_state.restore(broken)
    expected = draws()
    rng_state.restore(state)
    assert draws() == expected
