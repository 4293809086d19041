"""Optimiser steps that the device itself leaves out: the host need not know the loss before it asks for the step.

The flag is torch's own `optimizer.found_inf`, as loss scaling uses it: 0-d, 1 where nothing may change.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def unchanged_if(found_inf: Tensor | None, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Around what changes `tensors` in place: they get back what they held, to the bit, where `found_inf` is 1.

    Args:
        found_inf: 0-d on the tensors' device; None: nothing is kept and nothing given back.
        tensors: kept twice while the block runs, so call it for a few at a time.
    """
    before = [] if found_inf is None else [tensor.clone() for tensor in tensors]
    yield
    if found_inf is not None:
        skipped = found_inf != 0
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(torch.where(skipped, old, tensor))


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step()` of an optimiser does nothing where its attribute `found_inf` is 1."""
    if type(optimizer) is torch.optim.AdamW:
        return all(group["fused"] for group in optimizer.param_groups)
    return bool(getattr(optimizer, "skips_on_device", False))


def step_unless(optimizer: torch.optim.Optimizer, found_inf: Tensor) -> None:
    """Takes a step that changes nothing where `found_inf` (0-d, 0 or 1) is 1."""
    optimizer.found_inf = found_inf.float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        optimizer.found_inf = None  # type: ignore[attr-defined]


def uncount_step(optimizer: torch.optim.Optimizer) -> None:
    """Takes back the counting, on the host, of a step that the device left out."""
    for state in optimizer.state.values():
        if isinstance(state.get("step"), int):
            state["step"] -= 1
