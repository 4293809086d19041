"""What the container says before it becomes the command that it was given."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docker/entrypoint.sh"


@pytest.fixture
def enter(tmp_path: Path):
    """Runs the entry point with a stand-in for `sana` that prints its arguments."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sana").write_text('#!/bin/sh\nfor word in "$@"; do echo "[$word]"; done\nexit 7\n')
    (tmp_path / "bin/sana").chmod(0o755)
    (tmp_path / ".cache").mkdir()

    def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        variables = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "HOME": str(tmp_path), "DEMO_PORT": "15432"}
        line = ["sh", str(SCRIPT), *words]
        return subprocess.run(line, env=variables | more, capture_output=True, text=True, check=False)

    return run


def test_words_and_exit_code_pass_through(enter) -> None:
    done = enter("sana", "generate", "a cat; $HOME", "-o", "")
    assert (done.returncode, done.stdout, done.stderr) == (7, "[generate]\n[a cat; $HOME]\n[-o]\n[]\n", "")


def test_the_web_app_is_announced_with_the_address_of_the_container(enter) -> None:
    assert ":1234 when it is ready" in enter("sana", "app", "--host=0.0.0.0", DEMO_PORT="1234").stderr
    assert enter("sana", "app", "--port=80").stderr == ""


def test_a_cache_that_cannot_be_written_is_said(enter) -> None:
    done = enter("sana", "doctor", HOME="/nowhere")
    assert "/nowhere/.cache cannot be written" in done.stderr
    assert '--user "$(id -u):$(id -g)"' in done.stderr
    assert done.returncode == 7
