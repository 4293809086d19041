"""The state of every random generator of a process: captured, and put back so that the streams go on bitwise.

Draws of data need none of this: they depend on seed, epoch and index alone.
"""

import random
from typing import Any

import numpy as np
import torch

from sana.utils.logging import get_logger

logger = get_logger(__name__)


def capture() -> dict[str, Any]:
    """The generators of Python, numpy (its global one), torch on the CPU and torch on every visible CUDA device.

    Returns:
        Tensors, numbers and tuples: `torch.load(weights_only=True)` reads it.
    """
    name, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(words.astype(np.int64)), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore(state: dict[str, Any]) -> None:
    """Puts back what `capture` returned. Devices that only one side has are left alone, with a log line.

    Raises:
        ValueError: `state` is not one of `capture`.
    """
    try:
        version, words, gauss = state["python"]
        python = (version, tuple(words), gauss)
        name, keys, *rest = state["numpy"]
        legacy = (name, keys.numpy().astype(np.uint32), *rest)
        cpu, devices = state["torch"], list(state["cuda"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"This is no state of random generators ({type(error).__name__}: {error}).") from error
    random.setstate(python)
    np.random.set_state(legacy)
    torch.set_rng_state(cpu)
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(devices) != present:
        logger.warning("random state of %d CUDA devices was saved, %d are here", len(devices), present)
    for index, device_state in enumerate(devices[:present]):
        torch.cuda.set_rng_state(device_state, index)
