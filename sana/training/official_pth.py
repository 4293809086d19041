"""Training checkpoints in the layout of the official code: one `.pth` file and the link `latest.pth`.

Weights alone are read by `sana.models.checkpoint`; our own checkpoints are folders (`checkpoints.py`).
"""

import errno
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sana.models import checkpoint as weight_files
from sana.models.checkpoint import CheckpointError
from sana.training.train_state import plain, sync_file, sync_folder, write_tensors
from sana.utils.logging import get_logger

logger = get_logger(__name__)

LATEST = "latest.pth"
GENERATOR_SEED = 42  # of the loader's generator, which the official code stores and never advances
_NAME = re.compile(r"epoch_(\d+)(?:_step_(\d+))?\.pth")


@dataclass(frozen=True)
class OfficialTrainingState:
    """What an official training checkpoint holds.

    Attributes:
        state_dict: the model's weights under official keys; may be memory-mapped.
        ema: the averaged weights, or None.
        optimizer: its state dict, or None; see `load_official_optimizer`.
        scheduler: its state dict, or None.
        epoch: epochs done.
        step: optimiser steps done; None when the file name does not say.
        rng_state: for `rng_state.restore`, or None.
    """

    state_dict: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    optimizer: dict[str, Any] | None
    scheduler: dict[str, Any] | None
    epoch: int
    step: int | None
    rng_state: dict[str, Any] | None


def official_name(epoch: int, step: int | None = None) -> str:
    return f"epoch_{epoch}.pth" if step is None else f"epoch_{epoch}_step_{step}.pth"


def save_official_pth(
    path: str | Path,
    *,
    state_dict: Mapping[str, Tensor],
    ema_state_dict: Mapping[str, Tensor] | None = None,
    optimizer: Mapping[str, Any] | None = None,
    scheduler: Mapping[str, Any] | None = None,
    epoch: int,
    rng_state: Mapping[str, Any],
) -> Path:
    """Writes a checkpoint that the official `train.py` resumes from, and points `latest.pth` beside it at it.

    Random states are stored as plain numbers, which numpy and Python accept as well as their own objects: the file
    holds nothing that `torch.load(weights_only=True)` refuses.

    Args:
        path: named by `official_name`: the official code reads epoch and step from the name.
        state_dict: the model's, official keys.
        ema_state_dict: the averaged model's.
        optimizer: state dict of the optimiser.
        scheduler: state dict of the learning-rate schedule.
        epoch: epochs done.
        rng_state: from `rng_state.capture`.

    Returns:
        The path.

    Raises:
        ValueError: the official code would not understand the name.
        OSError: it could not be written; the old file and `latest.pth` are untouched.
    """
    path = Path(path)
    if not _NAME.fullmatch(path.name):
        raise ValueError(f"{path.name} is no official name; use official_name(), such as {official_name(1, 400)}.")
    content: dict[str, Any] = {"state_dict": state_dict}
    if ema_state_dict is not None:
        content["state_dict_ema"] = ema_state_dict
    content |= {"optimizer": optimizer, "scheduler": scheduler, "epoch": epoch, "rng_state": _official_rng(rng_state)}
    content = {key: value for key, value in content.items() if value is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        write_tensors(partial, plain(content, where=path.name))
        sync_file(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    _point_latest(path)
    sync_folder(path.parent)
    return path


def load_official_training_state(path: str | Path) -> OfficialTrainingState:
    """Reads a whole official training checkpoint; `latest.pth` may be given.

    Raises:
        CheckpointError: it is damaged, holds code, or no training state.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist.")
    weights = weight_files.load_state_dict(path)
    content = _read_all(path)
    ema = weight_files.load_state_dict(path, ema=True) if isinstance(content.get("state_dict_ema"), Mapping) else None
    named = _NAME.fullmatch(path.resolve().name)
    epoch = content.get("epoch", named[1] if named else 0)
    return OfficialTrainingState(
        state_dict=weights,
        ema=ema,
        optimizer=content.get("optimizer"),
        scheduler=content.get("scheduler"),
        epoch=int(epoch),
        step=int(named[2]) if named and named[2] else None,
        rng_state=_house_rng(content["rng_state"], path) if content.get("rng_state") else None,
    )


def load_official_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> bool:
    """Loads an official optimiser state where it fits: same kind, groups, and shapes of parameters.

    Returns:
        Whether it was loaded; if not, the log says why and the optimiser is as before.
    """
    reason = _misfit(optimizer, saved)
    if reason:
        logger.warning("the optimiser starts afresh, its saved state does not fit: %s", reason)
        return False
    optimizer.load_state_dict(dict(saved))
    return True


def _misfit(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> str | None:
    """Why a state dict does not fit an optimiser; None if it does."""
    ours, theirs = optimizer.param_groups, saved.get("param_groups")
    if not isinstance(theirs, list) or not isinstance(saved.get("state"), Mapping):
        return "it is no state of an optimiser"
    sizes = [[len(group["params"]) for group in groups] for groups in (ours, theirs)]
    if sizes[0] != sizes[1]:
        return f"parameters per group are {sizes[1]} there and {sizes[0]} here"
    strangers = sorted({key for group in theirs for key in group} - {key for group in ours for key in group})
    if set(strangers) - {"initial_lr"}:
        return f"it is of another optimiser, with {', '.join(strangers)}"
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("betas", "eps"):
            if np.size(mine.get(key, ())) != np.size(other.get(key, ())):
                return f"it is of another optimiser: {key} is {other.get(key)} there and {mine.get(key)} here"
        for parameter, number in zip(mine["params"], other["params"], strict=True):
            for name in ("exp_avg", "momentum_buffer", "state1"):
                value = saved["state"].get(number, {}).get(name)
                if isinstance(value, Tensor) and value.numel() != parameter.numel():
                    return f"{name} of parameter {number} is {tuple(value.shape)}, for {tuple(parameter.shape)} here"
    return None


def _read_all(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        mapped = file.read(4) == b"PK\x03\x04"
    try:
        with weight_files._numpy_allowed():
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {str(error).strip().splitlines()[0][:200]}") from error
    if not isinstance(content, Mapping) or "state_dict" not in content:
        raise CheckpointError(f"{path} holds weights only, no training state: use it as model.load_from instead.")
    return dict(content)


def _official_rng(state: Mapping[str, Any]) -> dict[str, Any]:
    name, words, *rest = state["numpy"]
    generator = state.get("generator")
    if generator is None:
        generator = torch.Generator().manual_seed(GENERATOR_SEED).get_state()
    return {
        "torch": state["torch"],
        "torch_cuda": list(state["cuda"]),
        "numpy": (name, tuple(words.tolist()), *rest),
        "python": state["python"],
        "generator": generator,
    }


def _house_rng(state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    try:
        name, words, *rest = state["numpy"]
        house = {
            "python": state["python"],
            "numpy": (name, torch.from_numpy(np.asarray(words).astype(np.int64)), *rest),
            "torch": state["torch"],
            "cuda": list(state["torch_cuda"]),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a broken rng_state ({type(error).__name__}: {error}).") from error
    return house | ({"generator": state["generator"]} if "generator" in state else {})


def _point_latest(path: Path) -> None:
    """Makes `latest.pth` a link to the file: symbolic where the file system knows it, else hard."""
    latest, partial = path.with_name(LATEST), path.with_name(f"{LATEST}.partial")
    partial.unlink(missing_ok=True)
    try:
        partial.symlink_to(path.name)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise
        os.link(path, partial)
    os.replace(partial, latest)
