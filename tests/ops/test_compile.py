"""Every kernel compiles to PTX and a cubin for Ampere, Hopper and Blackwell, on any machine."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.compile_gate import ARCHITECTURES, load_specs

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes that a block may use (CUDA C programming guide)
NAMES = [spec.name for spec in load_specs([])]


@functools.cache
def gate() -> dict[tuple[str, int], dict]:
    """Runs the gate once, in a process of its own, since this one interprets kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.compile_gate"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    return {(result["name"], result["arch"]): result for result in json.loads(done.stdout)}


def test_names_are_unique() -> None:
    assert NAMES
    assert sorted(set(NAMES)) == sorted(NAMES)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: f"sm{architecture}")
@pytest.mark.parametrize("name", NAMES)
def test_compiles(name: str, architecture: int) -> None:
    result = gate()[name, architecture]
    assert result["error"] is None
    assert result["ptx"] > 0
    assert result["cubin"] > 0
    assert result["shared"] <= SHARED_MEMORY[architecture]
