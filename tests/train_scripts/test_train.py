"""The training commands: every way to start them works, signals end them politely, usage errors are one sentence."""

import os
import signal
import subprocess
import sys

import pytest

from sana.training.checkpoint_folder import CheckpointIndex, latest_checkpoint
from tests.training.distributed_runs import ROOT, Command, await_true, run_options, torchrun
from tests.training.run_results import last_step

TRAIN, SHELL = "train_scripts/train.py", ["bash", "train_scripts/train.sh"]
ACCELERATE = ["accelerate", "launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
              "--dynamo_backend=no", TRAIN]  # fmt: skip


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)


def test_an_unknown_key_is_named_with_the_nearest_one():
    result = run("train_scripts/train.py", "configs/sana_config/tiny/Sana_tiny_img256.yaml", "--train.sede=3")
    assert result.returncode == 2
    assert "train.seed" in result.stderr and "Traceback" not in result.stderr


def test_a_missing_config_is_one_sentence():
    result = run("train_scripts/train.py", "nowhere.yaml")
    assert result.returncode == 2
    assert "nowhere.yaml" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("script", ["train_scripts/train.py", "train_scripts/train_dcae.py"])
def test_help(script):
    result = run(script, "--help")
    assert result.returncode == 0
    assert "work_dir" in result.stdout + result.stderr


def test_no_config_is_a_usage_error():
    result = run("train_scripts/train.py", "--train.seed=3")
    assert result.returncode == 2
    assert "CONFIG.yaml" in result.stderr and "Traceback" not in result.stderr


@pytest.fixture
def options(tmp_path):
    """Two steps of a small transformer between the bundled model's other networks."""
    bundled = ROOT / "asset/models/sana_tiny"
    return [
        *run_options(tmp_path / "pictures", bundled / "text_encoder", bundled / "vae"), "--vae.vae_latent_dim=32",
        "--text_encoder.caption_channels=160", "--train.extra.max_steps=2", f"--work_dir={tmp_path / 'run'}",
    ]  # fmt: skip


def assert_trained(command, tmp_path, processes):
    """The command ends well after two steps, and so many processes wrote the checkpoint."""
    with Command(command, tmp_path / "output.txt") as run:
        run.finish()
    index = CheckpointIndex.read(latest_checkpoint(tmp_path / "run/checkpoints"))
    assert (index.step, index.world_size) == (2, processes)
    assert (tmp_path / "run/model/model.safetensors").exists()
    assert last_step(tmp_path / "run") == 2


def test_plain_python(options, tmp_path):
    assert_trained(["python", TRAIN, *options], tmp_path, 1)


@pytest.mark.slow
@pytest.mark.parametrize("launch", [torchrun(TRAIN), [*SHELL, "--np=2"]], ids=["torchrun", "train.sh"])
def test_two_processes(options, tmp_path, launch):
    assert_trained([*launch, *options], tmp_path, 2)


@pytest.mark.slow
def test_accelerate_launch(options, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert_trained([*ACCELERATE, *options], tmp_path, 2)


def test_the_shell_script_is_the_training_itself_where_there_is_one_process(options, tmp_path):
    """So that a scheduler's SIGTERM to it saves the state, and its exit code is the training's."""
    with Command([*SHELL, "--np=1", *options, "--train.extra.max_steps=10000"], tmp_path / "output.txt") as run:
        await_true(lambda: last_step(tmp_path / "run") >= 1, run)
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.wait() == 143, run.text
    assert "the same command goes on" in run.text
    checkpoint = latest_checkpoint(tmp_path / "run/checkpoints")
    assert CheckpointIndex.read(checkpoint).step == last_step(tmp_path / "run") < 10000
