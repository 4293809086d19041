"""The self-test passes where training keeps its promises, and every check fails where one is broken."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from sana.config import ConfigError, load_config
from sana.models.transformer import sana as transformer_module
from sana.training import run_state, selftest
from sana.training.ema import ExponentialMovingAverage
from sana.training.parallel import Parallel
from sana.training.selftest import CHECKS, run_selftest
from sana.training.selftest_measures import distance
from sana.training.trainer import Trainer
from tests.training.conftest import TINY_YAML

SHORT = {"minutes": 0}


@pytest.fixture
def config(image_options):
    return load_config(TINY_YAML, image_options)


def outcome(config, name, **options):
    found = {each.name: each for each in run_selftest(config, **SHORT, only=[name], **options)}
    assert found["build"].status == "ok" and set(found) == {"build", name}
    return found[name]


def failure(config, name):
    found = outcome(config, name)
    assert found.status == "failed", found
    return found.detail


def test_all_hold_and_nothing_is_left_behind(config, tmp_path):
    scratch, seen = tmp_path / "scratch", []
    scratch.mkdir()
    found = run_selftest(config, **SHORT, scratch=scratch, on_outcome=seen.append)
    assert [each.name for each in found] == list(CHECKS) and seen == found
    statuses = {each.name: each.status for each in found}
    assert statuses.pop("processes") == "skipped"
    assert set(statuses.values()) == {"ok"}, found
    numbers = {each.name: each.numbers for each in found}
    assert numbers["resume"] == {"bitwise": 1.0, "difference": 0.0}
    assert 0 <= numbers["accumulation"]["gradient_difference"] < 1e-4
    assert numbers["speed"]["images_per_second"] > 0 and numbers["data"]["samples"] == 10
    assert not (tmp_path / "run").exists() and not list(scratch.iterdir())


def test_a_run_that_exists_is_not_touched(config, tmp_path):
    Trainer(config).train()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert outcome(config, "resume").status == "ok"
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_drawn_scenes_and_a_trained_text_encoder(tiny_config):
    found = run_selftest(tiny_config, **SHORT, only=["accumulation", "checkpoint"])
    assert [each.status for each in found] == ["ok", "ok", "ok"], found


def test_batches_of_one(image_options):
    single = load_config(TINY_YAML, [*image_options, "--train.train_batch_size=1"])
    assert outcome(single, "accumulation").status == "ok"


def test_accumulation_that_forgets(config, monkeypatch):
    """The official trainer's error: gradients of all but the last micro-batch are lost."""
    backward = Parallel.backward

    def forgetting(self, loss):
        self.module.zero_grad()
        backward(self, loss)

    monkeypatch.setattr(Parallel, "backward", forgetting)
    assert "gradient" in failure(config, "accumulation")


def test_checkpointing_that_changes_the_result(config, monkeypatch):
    def other(block, inputs, *rest, use_reentrant, **options):
        return block(inputs * 1.01, *rest, **options)

    monkeypatch.setattr(transformer_module, "checkpoint", other)
    assert "is allowed" in failure(config, "checkpointing")


@pytest.mark.parametrize("factor", [0.0, 0.9])
def test_an_average_that_moves_too_little(config, monkeypatch, factor):
    def lagging(self, module):
        self.updates += 1
        for name, parameter in module.named_parameters():
            self.average[name].lerp_(parameter.detach(), factor * 9 / 11)

    monkeypatch.setattr(ExponentialMovingAverage, "update", lagging)
    assert "average is off" in failure(config, "ema")


def test_no_average_is_skipped(image_options):
    found = outcome(load_config(TINY_YAML, [*image_options, "--train.ema_update=false"]), "ema")
    assert found.status == "skipped" and "ema_update" in found.detail


def test_a_loss_that_does_not_fall(image_options):
    options = [*image_options, "--train.optimizer={type: AdamW, lr: 0.3}"]
    assert "train.optimizer.lr" in failure(load_config(TINY_YAML, options), "loss")


def test_a_loss_that_is_not_finite(config, monkeypatch):
    losses = Trainer.losses
    monkeypatch.setattr(Trainer, "losses", lambda self, *arguments: losses(self, *arguments) * torch.inf)
    for name in ("loss", "accumulation"):
        assert "not finite" in failure(config, name)


def test_unreadable_data(image_options, image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "images")
    (tmp_path / "images/picture_3.png").write_bytes((image_folder / "picture_3.png").read_bytes()[:60])
    options = [*image_options, f"--data.data_dir=[{tmp_path / 'images'}]"]
    assert "picture_3" in failure(load_config(TINY_YAML, options), "data")


def test_no_data_is_told_and_the_rest_is_skipped(image_options, tmp_path):
    (tmp_path / "empty").mkdir()
    found = run_selftest(load_config(TINY_YAML, [*image_options, f"--data.data_dir=[{tmp_path / 'empty'}]"]), **SHORT)
    assert found[0].status == "failed" and "empty" in found[0].detail
    assert {each.status for each in found[1:]} == {"skipped"}


def test_a_full_disk(config, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(selftest.shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 1000, 1000))
    assert "train.extra.keep_last" in failure(config, "checkpoint")


def test_a_checkpoint_that_changes_on_its_way(config, monkeypatch):
    save = run_state.save

    def damaging(trainer):
        save(trainer)
        path = trainer.checkpoints.folder / f"step_{trainer.step:08d}" / "shared.pt"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(run_state, "save", damaging)
    assert "damaged" in failure(config, "checkpoint")


def test_resuming_that_loses_the_place_in_the_data(config, monkeypatch):
    monkeypatch.setattr(run_state, "_restore_rank", lambda trainer, loaded: None)
    assert "next batch" in failure(config, "resume")


def test_resuming_that_loses_the_optimizer(config, monkeypatch):
    monkeypatch.setattr(Parallel, "load_optimizer_state", lambda *arguments: None)
    assert "bitwise" in failure(config, "resume")


@pytest.mark.parametrize(("other", "what"), [(("x", None), "data"), ((None, "x"), "weights")])
def test_processes_that_disagree(config, monkeypatch, other, what):
    gather = Parallel.gather

    def of_two(self, value):
        pair = isinstance(value, tuple) and len(value) == 2
        return [value, tuple(b or a for a, b in zip(value, other, strict=True))] if pair else gather(self, value)

    test = selftest.SelfTest(config, Path(config.work_dir), 0)
    test.build()
    monkeypatch.setattr(Parallel, "gather", of_two)
    test.trainer.parallel.world_size = 2
    with pytest.raises(selftest.CheckFailedError, match=f"process 1 has other {what}"):
        test.processes()


def test_an_unknown_check_is_named(config):
    with pytest.raises(ConfigError, match="accumulation"):
        run_selftest(config, only=["acumulation"])


def test_distance():
    one = {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2)}
    assert distance(one, one) == 0
    assert distance(one, {**one, "b": torch.tensor([0.0, 5.0])}) == pytest.approx(1.0)
    assert distance(one, {"a": one["a"]}) == float("inf")
