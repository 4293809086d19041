"""What the tests of checkpoints share: small states, listings, programs."""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import torch

from sana.training.checkpoints import Checkpoints

ROOT = Path(__file__).parents[2]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def value(step):
    return {"w": torch.full((50,), float(step)), "note": f"step {step}"}


def program(module, *arguments):
    return subprocess.run(
        [sys.executable, "-m", f"tests.training.{module}", *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def three_checkpoints(folder):
    """Steps 100, 200 and 300."""
    store = Checkpoints(folder)
    for step in (100, 200, 300):
        store.save(step, shared=value(step), per_rank={"rank": 0})
    return store


class Exploding:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def reindex(folder):
    """Makes the index agree with files that were changed."""
    index = json.loads((folder / "checkpoint.json").read_text())
    for name, entry in index["files"].items():
        content = (folder / name).read_bytes()
        entry.update(bytes=len(content), crc32=f"{zlib.crc32(content):08x}")
    (folder / "checkpoint.json").write_text(json.dumps(index))
