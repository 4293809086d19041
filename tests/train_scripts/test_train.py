"""The training commands: usage errors are one sentence with exit code 2."""

import subprocess
import sys

import pytest


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
