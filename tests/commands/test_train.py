"""sana train: whether it trains here or starts torchrun, and with which words. Training itself: tests/train_scripts."""

import json
import os
import signal
import sys

import pytest

from sana.commands import train
from sana.training import trainer as trainer_module
from sana.training.signals import StoppedBySignal
from tests.training.distributed_runs import ROOT

CONFIG = "configs/sana_config/tiny/Sana_tiny_img256.yaml"
LAUNCHER = ("WORLD_SIZE", "RANK", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


class StartedError(Exception):
    """Stands for the end of this process by exec."""


@pytest.fixture
def started(monkeypatch):
    """What was trained here, and which commands took this process's place."""
    seen = {"here": [], "command": None, "environment": None}

    def execve(path, command, environment):
        seen.update(command=command, environment=environment)
        raise StartedError

    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(train, "train", lambda arguments: seen["here"].append(arguments) or 0)
    return seen


def test_one_process_is_this_one(started, monkeypatch):
    monkeypatch.setattr(train, "gpus", lambda: 1)
    assert train.main([CONFIG, "--train.seed=3"]) == 0
    assert train.main([CONFIG, "--np=1"]) == 0
    assert started["here"] == [[CONFIG, "--train.seed=3"], [CONFIG]] and started["command"] is None


@pytest.mark.parametrize("words", [["--np=2"], ["--np", "2"]])
def test_several_are_started_by_torchrun(started, words):
    with pytest.raises(StartedError):
        train.main([CONFIG, *words, "--train.seed=3"])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert started["command"] == [*launcher, "-m", "sana.cli", "train", CONFIG, "--train.seed=3"]
    assert started["environment"]["OMP_NUM_THREADS"] == "1" and started["here"] == []


def test_there_is_one_process_for_each_gpu(started, monkeypatch):
    monkeypatch.setattr(train, "gpus", lambda: 8)
    with pytest.raises(StartedError):
        train.main([CONFIG])
    assert "--nproc_per_node=8" in started["command"]


def test_under_a_launcher_nothing_is_started(started, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train.main([CONFIG]) == 0 and started["here"] == [[CONFIG]]
    with pytest.raises(SystemExit, match="2"):
        train.main([CONFIG, "--np=2"])
    assert "a launcher has started this one" in capsys.readouterr().err


def test_several_machines(started, monkeypatch, capsys):
    monkeypatch.setenv("NNODES", "2")
    with pytest.raises(SystemExit, match="2"):
        train.main([CONFIG, "--np=1"])
    assert "NNODES is 2, and NODE_RANK and MASTER_ADDR must be set" in capsys.readouterr().err
    monkeypatch.setenv("NODE_RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    with pytest.raises(StartedError):
        train.main([CONFIG, "--np=1"])
    where = ["--nnodes=2", "--node_rank=1", "--master_addr=10.0.0.1", "--master_port=29500", "--nproc_per_node=1"]
    assert started["command"][3:8] == where and started["environment"]["OMP_NUM_THREADS"] == "4"


def test_mistakes_are_told_before_anything_starts(monkeypatch, capsys):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(train, "gpus", lambda: pytest.fail("torch was imported for nothing"))
    assert train.main(["--train.seed=3"]) == 2
    assert "CONFIG.yaml" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        train.main([CONFIG, "--np=0"])
    monkeypatch.setattr(train, "gpus", lambda: 1)
    assert train.main([str(ROOT / CONFIG), "--train.sede=3"]) == 2
    assert "train.seed" in capsys.readouterr().err


class Trained:
    """Stands for a trainer that has written a log and then ends as it is told."""

    ending: Exception | None = None
    reached = 4

    def __init__(self, config):
        self.work_dir, self.total_steps, self.step = config.work_dir, 4, 0

    def train(self):
        self.step = self.reached
        (self.work_dir / "train_log.jsonl").write_text('{"step": 2, "loss": 1.5}\n{"step": 4, "loss": 0.25}\n')
        if self.ending is not None:
            raise self.ending


@pytest.mark.parametrize(
    ("ending", "reached", "code", "reason"),
    [
        (None, 4, 0, "done"), (None, 3, 0, "early_stop_hours"), (StoppedBySignal(signal.SIGTERM), 3, 143, "SIGTERM"),
        (StoppedBySignal(signal.SIGINT), 4, 130, "SIGINT"),
    ],
)  # fmt: skip
def test_json_is_the_result(monkeypatch, capsys, tmp_path, ending, reached, code, reason):
    class Ending(Trained):
        def __init__(self, config):
            super().__init__(config)
            self.work_dir, self.ending, self.reached = tmp_path, ending, reached

    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(trainer_module, "Trainer", Ending)
    assert train.main([str(ROOT / CONFIG), "--np=1", "--json", f"--work_dir={tmp_path}"]) == code
    model = str(tmp_path / "model") if reason == "done" else None
    expected = {"work_dir": str(tmp_path), "steps": reached, "loss": 0.25, "model": model, "reason": reason}
    assert json.loads(capsys.readouterr().out) == expected
