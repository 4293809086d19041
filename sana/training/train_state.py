"""Saving and restoring the state of a training run: one atomic file that `torch.load(weights_only=True)` can read."""

import os
from pathlib import Path
from typing import Any

import torch


def save_train_state(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` (tensors, numbers, strings, dicts, lists) so that the file is either the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_train_state(path: Path) -> dict[str, Any] | None:
    """The saved state, or None where nothing was saved yet."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None
