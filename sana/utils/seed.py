"""Random numbers: seeding a process and drawing noise that does not depend on the batch. No sampler is here."""

import random
from collections.abc import Sequence

import numpy as np
import torch

MAX_SEED = 2**63 - 1


def seed_everything(seed: int) -> None:
    """Seeds Python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def make_generators(seed: int, count: int, device: str | torch.device = "cpu") -> list[torch.Generator]:
    """Returns `count` generators seeded `seed`, `seed + 1`, ...: one for each image.

    Raises:
        ValueError: the seed is not in [0, 2**63).
    """
    if not 0 <= seed <= MAX_SEED - count:
        raise ValueError(f"seed must be in [0, 2**63), not {seed}.")
    return [torch.Generator(device=device).manual_seed(seed + index) for index in range(count)]


def randn(
    shape: Sequence[int],
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Draws standard normal noise on the generator's own device, then moves it.

    Noise is drawn in float32 (float64 when that is asked for), so a 16-bit run starts from an fp32 run's noise.

    Args:
        shape: (B, ...).
        generator: one generator for the whole tensor, or one for each of the B rows: row i of a batch is then the
            noise that a batch of one draws with the same generator.
        device: where the result lives; the generator's device when None.
        dtype: of the result.

    Raises:
        ValueError: the number of generators is not B.
    """
    drawn_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if generator is None or isinstance(generator, torch.Generator):
        source = generator.device if generator is not None else device
        noise = torch.randn(*shape, generator=generator, device=source, dtype=drawn_dtype)
    else:
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators were given for {shape[0]} images; give one for each image.")
        rows = [torch.randn(1, *shape[1:], generator=g, device=g.device, dtype=drawn_dtype) for g in generator]
        noise = torch.cat([row.to(device) if device is not None else row for row in rows])
    return noise.to(device=device if device is not None else noise.device, dtype=dtype)
