"""Every kernel compiles to PTX and a cubin for Ampere, Hopper and Blackwell, on any machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from filelock import FileLock

from tests.ops.compile_gate import ARCHITECTURES, load_specs

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes that a block may use (CUDA C programming guide)
NAMES = [spec.name for spec in load_specs([])]
Results = dict[tuple[str, int], dict]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Runs the gate once for all workers, in a process of its own, since this one may interpret kernels."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if os.environ.get("PYTEST_XDIST_WORKER") else folder  # where all workers meet
    answer = folder / "compile_gate.json"
    with FileLock(f"{answer}.lock"):
        if not answer.exists():
            environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            command = [sys.executable, "-m", "tests.ops.compile_gate"]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            answer.write_text(done.stdout)
    return {(result["name"], result["arch"]): result for result in json.loads(answer.read_text())}


def test_names_are_unique() -> None:
    assert NAMES
    assert sorted(set(NAMES)) == sorted(NAMES)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: f"sm{architecture}")
@pytest.mark.parametrize("name", NAMES)
def test_compiles(compiled: Results, name: str, architecture: int) -> None:
    result = compiled[name, architecture]
    assert result["error"] is None
    assert result["ptx"] > 0
    assert result["cubin"] > 0
    assert result["shared"] <= SHARED_MEMORY[architecture]
