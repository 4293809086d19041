"""A training state round-trips and a killed save leaves the old one."""

import pytest
import torch

from sana.training import train_state


def test_round_trip_and_absence(tmp_path):
    path = tmp_path / "run" / "state.pt"
    assert train_state.load_train_state(path) is None
    train_state.save_train_state(path, {"step": 3, "model": {"w": torch.arange(4.0)}})
    loaded = train_state.load_train_state(path)
    assert loaded["step"] == 3
    assert torch.equal(loaded["model"]["w"], torch.arange(4.0))


def test_a_failed_save_keeps_the_old_state(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    train_state.save_train_state(path, {"step": 1})

    def broken(state, file):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(train_state.torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        train_state.save_train_state(path, {"step": 2})
    assert train_state.load_train_state(path) == {"step": 1}
