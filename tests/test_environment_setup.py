"""environment_setup.sh with stand-ins for python and conda that only write down what they are asked."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = """#!/bin/bash
echo "python $*" >>"$LOG"
if [ "$1 $2" = "-m venv" ]; then mkdir -p .venv/bin; cp "$0" .venv/bin/python; fi
if [ -n "${BROKEN:-}" ] && [[ "$*" == *requirements.lock* ]]; then exit 1; fi
exit 0
"""
CONDA = """#!/bin/bash
echo "conda $*" >>"$LOG"
case "$1 $2" in
  "info --base") echo "$BASE" ;;
  "env list") [ -d "$BASE/envs/sana" ] && echo "sana   $BASE/envs/sana" || true ;;
  "create -y") mkdir -p "$BASE/envs/sana/bin"; cp "$(dirname "$0")/python3.11" "$BASE/envs/sana/bin/python" ;;
esac
"""


class Machine:
    """A folder with the script, its inputs, and a PATH that holds the stand-ins and the usual tools."""

    def __init__(self, folder: Path, conda: bool) -> None:
        self.repository, self.bin, self.log = folder / "sana", folder / "bin", folder / "log"
        self.repository.mkdir(parents=True)
        self.bin.mkdir()
        for name in ("environment_setup.sh", "requirements.lock", "pyproject.toml"):
            shutil.copy(ROOT / name, self.repository)
        for name, text in {"python3.11": PYTHON, **({"conda": CONDA} if conda else {})}.items():
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)

    def run(self, *arguments: str, **more: str) -> tuple[int, str, list[str]]:
        """Returns the exit code, what was printed, and what python and conda were asked."""
        self.log.write_text("")
        environment = os.environ | {"PATH": f"{self.bin}:/usr/bin:/bin", "LOG": str(self.log)}
        environment |= {"BASE": str(self.bin.parent / "conda")} | more
        environment.pop("PYTHON", None)
        done = subprocess.run(
            ["bash", str(self.repository / "environment_setup.sh"), *arguments],
            cwd=self.bin.parent,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr, self.log.read_text().splitlines()


@pytest.fixture
def machine(tmp_path: Path):
    return lambda conda=False: Machine(tmp_path, conda)


def installs(asked: list[str]) -> list[str]:
    return [line for line in asked if " pip install" in line]


def test_without_a_name_a_venv_is_made_once(machine) -> None:
    here = machine(conda=True)
    code, printed, asked = here.run()
    assert (code, len(installs(asked))) == (0, 2)
    assert "source .venv/bin/activate" in printed
    assert not [line for line in asked if line.startswith("conda")]
    code, printed, asked = here.run()
    assert (code, installs(asked)) == (0, [])
    assert "up to date" in printed


def test_new_requirements_are_installed(machine) -> None:
    here = machine()
    here.run()
    with (here.repository / "requirements.lock").open("a") as lock:
        lock.write("# changed\n")
    assert len(installs(here.run()[2])) == 2
    assert installs(here.run()[2]) == []


def test_a_broken_installation_is_not_taken_for_a_good_one(machine) -> None:
    here = machine()
    code, printed, _ = here.run(BROKEN="1")
    assert code != 0
    assert "ready" not in printed
    assert len(installs(here.run()[2])) == 2


def test_a_name_without_conda_says_so_and_uses_venv(machine) -> None:
    here = machine()
    code, printed, asked = here.run("sana")
    assert (code, len(installs(asked))) == (0, 2)
    assert "conda is not here" in printed
    assert (here.repository / ".venv/bin/python").exists()


def test_a_name_with_conda_makes_that_environment_once(machine) -> None:
    here = machine(conda=True)
    code, printed, asked = here.run("sana")
    assert code == 0, printed
    assert "conda create -y -n sana python=3.11 pip" in asked
    assert "conda activate sana" in printed
    assert not (here.repository / ".venv").exists()
    code, printed, asked = here.run("sana")
    assert (code, installs(asked)) == (0, [])
    assert not [line for line in asked if "create" in line]


def test_too_many_arguments(machine) -> None:
    code, printed, asked = machine().run("a", "b")
    assert (code, asked) == (1, [])
    assert "usage" in printed
