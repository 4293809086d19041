"""Files in the official layout: ours are what the official code reads, and theirs resume here bitwise."""

import errno
import os
import random
import re

import numpy as np
import pytest
import torch
from torch import nn

from sana.models.checkpoint import CheckpointError, load_state_dict
from sana.training import official_pth, rng_state, train_state
from sana.training.official_pth import (
    load_official_optimizer,
    load_official_training_state,
    official_name,
    save_official_pth,
)
from tests.training.checkpoint_tools import Exploding


def run(*, steps=3, kind=torch.optim.AdamW, width=4):
    """A little training: (model, optimizer, scheduler)."""
    torch.manual_seed(0)
    model = nn.Linear(3, width)
    optimizer = kind(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    advance(model, optimizer, scheduler, steps)
    return model, optimizer, scheduler


def advance(model, optimizer, scheduler, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        scheduler.step()


def draws():
    return [random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item()]


def save_ours(path, *, ema=True):
    model, optimizer, scheduler = run()
    average = {name: tensor + 1 for name, tensor in model.state_dict().items()} if ema else None
    return save_official_pth(
        path, state_dict=model.state_dict(), ema_state_dict=average, optimizer=optimizer.state_dict(),
        scheduler=scheduler.state_dict(), epoch=2, rng_state=rng_state.capture(),
    )  # fmt: skip


def save_theirs(path, model, optimizer, scheduler):
    """Written as the official code does: live objects of numpy and Python."""
    content = {
        "state_dict": model.state_dict(), "state_dict_ema": model.state_dict(), "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(), "epoch": 4,
        "rng_state": {
            "torch": torch.get_rng_state(), "torch_cuda": torch.cuda.get_rng_state_all(),
            "numpy": np.random.get_state(), "python": random.getstate(),
            "generator": torch.Generator().manual_seed(42).get_state(),
        },
    }  # fmt: skip
    torch.save(content, path)


def test_the_layout_is_the_official_one_and_needs_no_trust(tmp_path):
    path = save_ours(tmp_path / official_name(2, 400))
    assert path.name == "epoch_2_step_400.pth" and official_name(2) == "epoch_2.pth"
    content = torch.load(path, weights_only=True)
    assert set(content) == {"state_dict", "state_dict_ema", "optimizer", "scheduler", "epoch", "rng_state"}
    assert set(content["rng_state"]) == {"torch", "torch_cuda", "numpy", "python", "generator"}
    assert content["epoch"] == 2 and content["scheduler"]["last_epoch"] == 3
    assert "state_dict_ema" not in torch.load(save_ours(tmp_path / official_name(3), ema=False), weights_only=True)
    generator = torch.Generator()
    generator.set_state(content["rng_state"]["generator"])
    assert generator.initial_seed() == 42


def test_the_official_way_of_restoring_goes_on_bitwise(tmp_path):
    random.seed(1), np.random.seed(1)
    draws()
    path = save_ours(tmp_path / official_name(2, 400))
    expected = [draws() for _ in range(3)]
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    state = torch.load(path, weights_only=True)["rng_state"]
    if state["torch_cuda"]:
        torch.cuda.set_rng_state_all(state["torch_cuda"])
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    assert [draws() for _ in range(3)] == expected


@pytest.mark.parametrize("legacy", [False, True])
def test_an_official_run_goes_on_bitwise(tmp_path, monkeypatch, legacy):
    model, optimizer, scheduler = run()
    path = tmp_path / "epoch_4_step_1200.pth"
    if legacy:  # before torch 1.6: no zip, and not to be memory-mapped
        real = torch.save
        monkeypatch.setattr(torch, "save", lambda *a: real(*a, _use_new_zipfile_serialization=False))
    save_theirs(path, model, optimizer, scheduler)
    monkeypatch.undo()
    expected_draws = draws()
    advance(model, optimizer, scheduler, 4)
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    state = load_official_training_state(path)
    assert (state.epoch, state.step) == (4, 1200)
    other, other_optimizer, other_scheduler = run(steps=0)
    other.load_state_dict(state.state_dict)
    assert load_official_optimizer(other_optimizer, state.optimizer)
    other_scheduler.load_state_dict(state.scheduler)
    rng_state.restore(state.rng_state)
    assert draws() == expected_draws
    advance(other, other_optimizer, other_scheduler, 4)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    assert other_scheduler.get_last_lr() == scheduler.get_last_lr()
    assert set(state.ema) == {"weight", "bias"}


def test_ours_reads_back_and_serves_as_weights(tmp_path):
    path = save_ours(tmp_path / official_name(2, 400))
    state = load_official_training_state(tmp_path / "latest.pth")
    assert (state.epoch, state.step) == (2, 400)
    rng_state.restore(state.rng_state)
    weights, average = load_state_dict(path), load_state_dict(path, ema=True)
    assert all(torch.equal(average[name], weights[name] + 1) for name in weights)
    assert torch.equal(state.ema["bias"], average["bias"]) and torch.equal(state.state_dict["bias"], weights["bias"])


def test_latest_points_at_the_newest(tmp_path):
    save_ours(tmp_path / official_name(1, 100))
    newest = save_ours(tmp_path / official_name(1, 200))
    latest = tmp_path / "latest.pth"
    assert os.readlink(latest) == newest.name  # relative: the folder may be moved
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch_1_step_100.pth", "epoch_1_step_200.pth", "latest.pth"]


def test_latest_is_a_hard_link_where_there_are_no_symbolic_ones(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(official_pth.Path, "symlink_to", refuse)
    path = save_ours(tmp_path / official_name(1, 100))
    assert os.path.samefile(path, tmp_path / "latest.pth") and not (tmp_path / "latest.pth").is_symlink()


def test_a_full_disk_keeps_the_old_file_and_the_link(tmp_path, monkeypatch):
    path = save_ours(tmp_path / official_name(1, 100))
    before = path.read_bytes()

    def full(self, data):
        self.error = OSError(errno.ENOSPC, "No space left on device")
        raise self.error

    monkeypatch.setattr(train_state._WatchedFile, "write", full)
    for name in (path.name, official_name(1, 200)):
        with pytest.raises(OSError, match="No space left"):
            save_ours(tmp_path / name)
    assert path.read_bytes() == before and os.readlink(tmp_path / "latest.pth") == path.name
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["model.pth", "epoch_1_step_2.pt", "epoch_x.pth", "latest.pth"])
def test_a_name_the_official_code_cannot_read_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="no official name"):
        save_ours(tmp_path / name)


def test_what_is_no_training_state_is_refused(tmp_path):
    weights = {"weight": torch.ones(2)}
    with pytest.raises(CheckpointError, match="does not exist"):
        load_official_training_state(tmp_path / "epoch_1.pth")
    torch.save(weights, tmp_path / "flat.pth")
    with pytest.raises(CheckpointError, match=r"weights only, no training state: use it as model\.load_from"):
        load_official_training_state(tmp_path / "flat.pth")
    torch.save({"state_dict": weights, "rng_state": {"torch": 1}}, tmp_path / "rng.pth")
    with pytest.raises(CheckpointError, match="broken rng_state"):
        load_official_training_state(tmp_path / "rng.pth")
    torch.save({"state_dict": weights, "epoch": Exploding(tmp_path / "ran")}, tmp_path / "code.pth")
    with pytest.raises(CheckpointError, match="mkdir"):
        load_official_training_state(tmp_path / "code.pth")
    assert not (tmp_path / "ran").exists()
    os.truncate(tmp_path / "rng.pth", 300)
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        load_official_training_state(tmp_path / "rng.pth")


def test_weights_with_nothing_else_are_a_start(tmp_path):
    torch.save({"state_dict": {"weight": torch.ones(2)}}, tmp_path / "epoch_7_step_9.pth")
    state = load_official_training_state(tmp_path / "epoch_7_step_9.pth")
    assert (state.epoch, state.step) == (7, 9)
    assert state.ema is state.optimizer is state.scheduler is state.rng_state is None


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"kind": torch.optim.SGD}, "another optimiser"),
        ({"kind": torch.optim.Adafactor}, "another optimiser"),
        ({"width": 5}, r"exp_avg of parameter 0 is \(5, 3\), for \(4, 3\) here"),
    ],
)
def test_an_optimiser_state_that_does_not_fit_is_left_out(caplog, other, reason):
    _, optimizer, _ = run()
    before = [tensor.clone() for tensor in optimizer.state_dict()["state"][0].values()]
    saved = run(**other)[1].state_dict()
    assert not load_official_optimizer(optimizer, saved)
    assert caplog.records[0].levelname == "WARNING"
    torch.testing.assert_close(list(optimizer.state_dict()["state"][0].values()), before, rtol=0, atol=0)
    assert re.search(reason, caplog.text)


@pytest.mark.parametrize("saved", [{}, {"state": {}, "param_groups": 3}, {"state": {}, "param_groups": []}])
def test_what_is_no_optimiser_state_is_left_out(saved):
    assert not load_official_optimizer(run()[1], saved)
