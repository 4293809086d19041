"""The tiny workflow through ComfyUI itself: its server, validation, execution and files. Needs a checkout of it.

COMFYUI_DIR names the checkout (pinned: v0.3.27) and COMFYUI_PYTHON, if it is another, the Python that has its
requirements and `sana`.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sana import SanaPipeline
from tests.comfyui.conftest import ROOT, Comfy
from tests.comfyui.graphs import load, to_prompt
from tests.comfyui.test_workflows import entry, expected, node_id

FOLDER = os.environ.get("COMFYUI_DIR")
pytestmark = [
    pytest.mark.skipif(FOLDER is None, reason="set COMFYUI_DIR to a checkout of ComfyUI v0.3.27 with its requirements"),
    pytest.mark.slow,
]


def ask(address: str, data: Any = None) -> bytes:
    body = None if data is None else json.dumps(data).encode()
    with urllib.request.urlopen(urllib.request.Request(address, body), timeout=30) as answer:
        return answer.read()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """ComfyUI on a free port, with its folders in a temporary one and the pack in custom_nodes."""
    assert FOLDER is not None
    (tmp_path / "custom_nodes").mkdir()
    (tmp_path / "custom_nodes" / "sana").symlink_to(ROOT / "comfyui")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    options = ["--cpu", f"--port={port}", "--disable-auto-launch", f"--base-directory={tmp_path}"]
    log = (tmp_path / "log.txt").open("w")
    process = subprocess.Popen([python, "main.py", *options], cwd=FOLDER, stdout=log, stderr=subprocess.STDOUT)
    try:
        _until(lambda: process.poll() is not None or _answers(f"http://127.0.0.1:{port}/system_stats"), 300)
        assert process.poll() is None, (tmp_path / "log.txt").read_text()[-2000:]
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def _answers(address: str) -> bool:
    try:
        return bool(ask(address))
    except OSError:
        return False


def _until(condition: Any, seconds: float) -> None:
    done = threading.Event()
    for _ in range(int(seconds * 4)):
        if condition():
            return
        done.wait(0.25)
    raise AssertionError(f"not within {seconds} s")


def test_the_tiny_workflow_makes_the_pipelines_pictures(server: str, comfy: Comfy, pipeline: SanaPipeline) -> None:
    prompt = to_prompt(load("sana_tiny"), comfy.nodes)
    entry(prompt, "SanaSampler")["steps"] = 3
    number = json.loads(ask(f"{server}/prompt", {"prompt": prompt}))["prompt_id"]
    _until(lambda: number in json.loads(ask(f"{server}/history/{number}")), 300)
    history = json.loads(ask(f"{server}/history/{number}"))[number]
    assert history["status"]["status_str"] == "success", history["status"]
    wanted = (255 * expected(pipeline, prompt, 256, 256, count=4).numpy()).clip(0, 255).astype(np.uint8)
    images = history["outputs"][node_id(prompt, "SaveImage")]["images"]
    for image, judged in zip(images, wanted, strict=True):
        query = "&".join(f"{name}={image[name]}" for name in ("filename", "subfolder", "type"))
        made = np.asarray(Image.open(BytesIO(ask(f"{server}/view?{query}"))))
        assert np.array_equal(made, judged)
