"""What the self-test measures with: parts of batches, gradients without a step, distances. The checks are elsewhere."""

import hashlib
import math
import resource
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sana.config import SanaConfig
from sana.config_extra import train_extra
from sana.data.collate import Batch

if TYPE_CHECKING:
    from sana.training.trainer import Trainer


@dataclass(frozen=True)
class Gradients:
    """What a step would have used.

    Attributes:
        loss: mean over all images of all processes.
        norm: of the gradient before clipping.
        gradients: after clipping, by name; this process's shards under FSDP.
    """

    loss: float
    norm: float
    gradients: dict[str, Tensor]


class _Recorder:
    """Stands where the optimiser, the scheduler and the average of a trainer stand, and notes gradients."""

    def __init__(self, trainer: "Trainer") -> None:
        self.trainer, self.real = trainer, trainer.optimizer
        self.param_groups = self.real.param_groups
        self.gradients: dict[str, Tensor] | None = None

    def step(self) -> None:
        named = self.trainer.objective.named_parameters()
        self.gradients = {name: local(p.grad).float().cpu().clone() for name, p in named if p.grad is not None}
        if scaler := self.trainer.parallel.accelerator.scaler:  # or it would not unscale a second time
            scaler.update()

    def zero_grad(self) -> None:
        self.real.zero_grad()


class _Idle:
    def step(self) -> None:
        pass


def gradients(trainer: "Trainer", batches: list[Batch]) -> Gradients | None:
    """One `train_step` at the beginning of the run, without its effects. Every process must call it.

    Returns:
        None where the loss or its gradient is not finite.
    """
    trainer.settle()
    names = ("optimizer", "scheduler", "ema", "step", "samples")
    before, count = {name: getattr(trainer, name) for name in names}, trainer.guard.count
    recorder = _Recorder(trainer)
    try:
        for name, value in (("optimizer", recorder), ("scheduler", _Idle()), ("ema", None), ("samples", 0)):
            setattr(trainer, name, value)
        trainer.train_step(batches)
    finally:
        for name, value in before.items():
            setattr(trainer, name, value)
    if recorder.gradients is None or trainer.guard.count != count:
        return None
    return Gradients(trainer.report.losses[-1], trainer.report.grad_norms[-1], recorder.gradients)


def distance(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Relative RMS difference of two sets of tensors with the same names; infinite if only one has a name."""
    if first.keys() != second.keys():
        return math.inf
    wrong = sum((first[name].double() - second[name].double()).square().sum().item() for name in first)
    size = sum(value.double().square().sum().item() for value in first.values())
    return math.sqrt(wrong / size) if size else (0.0 if not wrong else math.inf)


def local(tensor: Tensor) -> Tensor:
    """This process's shard, or the tensor itself; without gradient."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()


def local_weights(trainer: "Trainer") -> dict[str, Tensor]:
    """Copies of this process's weights and averages, on the CPU."""
    named = dict(trainer.objective.named_parameters())
    averages = {f"average of {name}": value for name, value in (trainer.ema.average if trainer.ema else {}).items()}
    return {name: local(value).float().cpu().clone() for name, value in {**named, **averages}.items()}


def digest(trainer: "Trainer") -> str:
    """A hash of the whole weights; every process must ask."""
    found = hashlib.blake2b(digest_size=16)
    for _, parameter in trainer.objective.named_parameters():
        found.update(trainer.parallel.full(parameter).detach().float().cpu().numpy().tobytes())
    return found.hexdigest()


def part(batch: Batch, first: int, end: int) -> Batch:
    """The images `first` to `end` of a batch."""
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    cut: dict[str, Any] = {k: v[first:end] for k, v in values.items() if isinstance(v, list | Tensor)}
    return replace(batch, **cut)


def joined(first: Batch, second: Batch) -> Batch:
    """Two batches of one shape as one."""
    values = {f.name: (getattr(first, f.name), getattr(second, f.name)) for f in fields(first)}
    both: dict[str, Any] = {name: [*a, *b] for name, (a, b) in values.items() if isinstance(a, list)}
    both |= {name: torch.cat(pair) for name, pair in values.items() if isinstance(pair[0], Tensor)}
    return replace(first, **both)


def chunks(batches: Sequence[Batch]) -> list[Batch]:
    """Both halves of every batch, in order: the images that have the same places in a run with half the batch."""
    halves = [(batch, len(batch) // 2) for batch in batches]
    return [each for batch, half in halves for each in (part(batch, 0, half), part(batch, half, 2 * half))]


def peak_bytes() -> int:
    """Most memory used so far: of the GPU since its statistics were reset, else of the process since its start."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def harmless(config: SanaConfig, folder: Path) -> SanaConfig:
    """The configuration with a temporary work_dir, a constant learning rate, and nothing shown or resumed."""
    config = deepcopy(config)
    config.work_dir = str(folder / "run")
    config.resume_from = config.model.resume_from = None
    config.report_to, config.train.visualize = "none", False
    config.train.lr_schedule, config.train.lr_schedule_args = "constant", {"num_warmup_steps": 0}
    pool = min(train_extra(config.train.extra).pool_size, 2 * config.train.train_batch_size)
    quick = {"pool_size": pool, "async_save": False, "save_pth": False, "keep_last": 1, "keep_every": 0}
    config.train.extra = {**(config.train.extra or {}), **quick}
    return config
