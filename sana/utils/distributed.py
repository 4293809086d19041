"""Rank and world size of this process, as torchrun and accelerate announce them. No process group is started here."""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def _process_group() -> Any:
    """Returns torch.distributed if a process group runs, else None; torch is not imported for this."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def rank() -> int:
    """Returns this process's index among all processes (0 when alone)."""
    if (group := _process_group()) is not None:
        return int(group.get_rank())
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Returns this process's index on its own machine (0 when alone)."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Returns the number of processes (1 when alone)."""
    if (group := _process_group()) is not None:
        return int(group.get_world_size())
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process is the one that logs and writes shared files."""
    return rank() == 0


def main_process_only(function: Callable[P, R]) -> Callable[P, R | None]:
    """Makes a function do nothing, and return None, on every process but the main one."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R | None:
        return function(*args, **kwargs) if is_main_process() else None

    return guarded


def share(items: Sequence[T]) -> Sequence[T]:
    """Returns this process's part of a list: every `world_size()`-th item from `rank()` on."""
    return items[rank() :: world_size()]


def barrier() -> None:
    """Waits for all processes of the process group, if there is one."""
    if (group := _process_group()) is not None:
        group.barrier()
