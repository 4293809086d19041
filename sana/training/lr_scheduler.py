"""Learning rates over a run: warm-up, then constant, linear, cosine, or cosine to a constant. No optimiser is built."""

import math
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sana.config import ConfigError
from sana.registry import suggest

SCHEDULES = ("constant", "linear", "cosine", "cosine_decay_to_constant")
ARGUMENTS = {  # what train.lr_schedule_args may hold
    "constant": ("num_warmup_steps",),
    "linear": ("num_warmup_steps",),
    "cosine": ("num_warmup_steps", "num_cycles"),
    "cosine_decay_to_constant": ("num_warmup_steps", "num_cycles", "num_decay", "final_lr"),
}


def lr_factor(
    name: str,
    step: int,
    *,
    total_steps: int,
    num_warmup_steps: int = 0,
    num_cycles: float = 0.5,
    num_decay: float = 0.667,
    final_lr: float = 0.0,
) -> float:
    """Returns what the base learning rate is multiplied with in optimiser step `step` (0 is the first).

    With w = num_warmup_steps, T = total_steps and x = (step - w) / (T - w): step / w before w (the first step of a
    warm-up changes nothing, as official), then

    - constant: 1;
    - linear: 1 - x, and 0 after T;
    - cosine: (1 + cos(2 pi num_cycles x)) / 2. A run ends at T, where half a cycle is 0; the formula goes on, so that
      steps after T rise again, which is what the official code gives;
    - cosine_decay_to_constant: the same between 1 and final_lr with int(num_decay T) in the place of T, then final_lr.

    Args:
        name: one of SCHEDULES.
        step: optimiser steps done before this one.
        total_steps: T, of the whole run.
        num_warmup_steps: w.
        num_cycles: waves of the cosine; 0.5 falls once.
        num_decay: part of the run in which the learning rate falls.
        final_lr: what remains at the end, as a part of the base learning rate.

    Raises:
        ConfigError: unknown name.
    """
    if name not in SCHEDULES:
        raise ConfigError(
            f"train.lr_schedule is {name!r}.{suggest(str(name), list(SCHEDULES))} Known: {', '.join(SCHEDULES)}."
        )
    if step < num_warmup_steps:
        return step / num_warmup_steps
    if name == "constant":
        return 1.0
    end = int(total_steps * num_decay) if name == "cosine_decay_to_constant" else total_steps
    fraction = (step - num_warmup_steps) / max(1, end - num_warmup_steps)
    if name == "linear":
        return max(0.0, 1.0 - fraction)
    wave = max(0.0, 0.5 * (1 + math.cos(2 * math.pi * num_cycles * fraction)))
    if name == "cosine":
        return wave
    return final_lr if step > end else final_lr + (1 - final_lr) * wave


def build_lr_scheduler(
    optimizer: Optimizer,
    name: str,
    args: Mapping[str, Any] | None = None,
    *,
    total_steps: int,
    lr_scale_ratio: float = 1.0,
) -> LambdaLR:
    """Returns a scheduler for `train.lr_schedule`; call its `step()` once after every optimiser step.

    Args:
        optimizer: its groups' learning rates are the base.
        name: one of SCHEDULES.
        args: `train.lr_schedule_args`.
        total_steps: optimiser steps of the whole run, not of micro-batches.
        lr_scale_ratio: what `auto_scale_lr` returned; cosine_decay_to_constant ends at the learning rate before it.

    Raises:
        ConfigError: unknown name or argument, or a value that is not allowed.
    """
    options = _check(name, dict(args or {}), total_steps)
    if name == "cosine_decay_to_constant" and "final_lr" not in options:
        if lr_scale_ratio < 1:
            raise ConfigError(
                "train.lr_schedule cosine_decay_to_constant ends at the learning rate before train.auto_lr scaled it, "
                f"but that scaled it down, by {lr_scale_ratio:g}; use cosine, or give lr_schedule_args.final_lr."
            )
        options["final_lr"] = 1 / lr_scale_ratio
    return LambdaLR(optimizer, lambda step: lr_factor(name, step, total_steps=total_steps, **options))


def _check(name: str, options: dict[str, Any], total_steps: int) -> dict[str, Any]:
    lr_factor(name, 0, total_steps=max(1, total_steps))  # refuses an unknown name
    if total_steps < 1:
        raise ConfigError(f"A run of {total_steps} optimiser steps has no learning-rate schedule; it needs one step.")
    for key, value in options.items():
        if key not in ARGUMENTS[name]:
            raise ConfigError(
                f"train.lr_schedule_args has no key {key!r} for {name}.{suggest(str(key), list(ARGUMENTS[name]))} "
                f"Known: {', '.join(ARGUMENTS[name])}."
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ConfigError(f"train.lr_schedule_args.{key} is {value!r}; it must be a number that is not negative.")
    return options
