"""The pipeline on another device than the CPU: see `stand_in_device.py`, which would stop at a tensor left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.stand_in_device import CASES, WAYS

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5  # RMS; the device computes by other operators than the CPU, in float32 as well


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, "-m", "tests.pipelines.stand_in_device"],
        cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize("case", CASES)
def test_pictures_are_those_of_the_cpu(seen: dict[str, Any], case: str) -> None:
    found, levels = seen["pictures"][case], case == "pil"
    assert found["error"] <= (1 / 255 if levels else TOLERANCE)
    assert found["there"] is not levels and found["weights"] == 1


@pytest.mark.parametrize("way", WAYS)
def test_settings_of_memory_hold_there_too(seen: dict[str, Any], way: str) -> None:
    found = seen["ways"][way]
    assert found["error"] <= TOLERANCE and found["there"]
    assert found["weights"] == (1 if way == "tiles" else 0), "offloaded weights are on the host again"


def test_a_distilled_model(seen: dict[str, Any]) -> None:
    found = seen["sprint"]
    assert found["error"] <= TOLERANCE and found["there"] and found["weights"] == 1
