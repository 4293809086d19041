"""What the image installs, made of pyproject.toml and requirements.lock."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docker/requirements.py"
MODULE = runpy.run_path(str(SCRIPT))
PYPROJECT = {
    "build-system": {"requires": ["setuptools>=77"]},
    "project": {"dependencies": ["torch>=2", "numpy"], "optional-dependencies": {"serve": ["fastapi", "numpy"]}},
}


def test_the_package_what_builds_it_and_the_chosen_extras() -> None:
    assert MODULE["requirements"](PYPROJECT, []) == ["setuptools>=77", "torch>=2", "numpy"]
    assert MODULE["requirements"](PYPROJECT, ["serve"]) == ["setuptools>=77", "torch>=2", "numpy", "fastapi"]
    with pytest.raises(ValueError, match=r"'ray'.*serve"):
        MODULE["requirements"](PYPROJECT, ["ray"])


def test_constraints_have_no_extras_of_a_package() -> None:
    lock = '# comment\n\na[b,c]==1; platform_system == "Linux"\nd==2\n'
    assert MODULE["constraints"](lock) == ['a==1; platform_system == "Linux"', "d==2"]


def test_every_requirement_of_this_package_is_locked(tmp_path: Path) -> None:
    words = [sys.executable, str(SCRIPT), str(tmp_path), "gradio", "serve", "bitsandbytes", "torchao"]
    subprocess.run(words, check=True, cwd=tmp_path)
    wanted = (tmp_path / "requirements.txt").read_text().split("\n")
    locked = re.findall(r"^([\w.-]+)==", (tmp_path / "constraints.txt").read_text(), re.MULTILINE)
    names = [re.split(r"[<>=\[]", line)[0].replace("_", "-").lower() for line in wanted if line]
    assert {"torch", "gradio", "fastapi"} <= set(names)
    assert [name for name in names if name not in {one.replace("_", "-").lower() for one in locked}] == []


def test_an_unknown_extra_ends_the_build(tmp_path: Path) -> None:
    words = [sys.executable, str(SCRIPT), str(tmp_path), "nothing"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"error: EXTRAS names 'nothing'; .*\n", done.stderr)
