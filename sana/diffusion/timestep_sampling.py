"""Which noise level a training sample gets: uniform, logit-normal, mode, TrigFlow. No shift is applied here."""

import math

import torch
from torch import Tensor

from sana.diffusion.flow import NUM_TRAIN_TIMESTEPS

SCHEMES = ("uniform", "logit_normal", "mode", "logit_normal_trigflow")
_SYNONYMS = {"": "uniform", "none": "uniform", "trigflow": "logit_normal_trigflow"}  # as configs spell them


def sample_density(
    scheme: str,
    count: int,
    *,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
    sigma_data: float = 0.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws unshifted times (Esser et al. 2024, section 3.1; sCM, Lu and Song 2024, for TrigFlow).

    Args:
        scheme: one of SCHEMES.
        count: how many.
        logit_mean: mean of the normal before the sigmoid; below 0 favours small noise.
        logit_std: its standard deviation.
        mode_scale: weight of the middle for "mode", in [-1, 1.75]; 0 is uniform.
        sigma_data: standard deviation of the data for "logit_normal_trigflow".
        generator: on the CPU; torch's global one when None.

    Returns:
        (count,) float32 on the CPU: in [0, 1], or an angle in [0, pi/2] for "logit_normal_trigflow".

    Raises:
        ValueError: unknown scheme.
    """
    scheme = _SYNONYMS.get(str(scheme).lower(), scheme)
    if scheme == "uniform":
        return torch.rand(count, generator=generator)
    if scheme == "mode":
        u = torch.rand(count, generator=generator)
        return 1 - u - mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    if scheme not in SCHEMES:
        raise ValueError(f"Unknown timestep scheme {scheme!r}; known schemes: {', '.join(SCHEMES)}.")
    normal = torch.randn(count, generator=generator) * logit_std + logit_mean
    if scheme == "logit_normal":
        return torch.sigmoid(normal)
    return torch.atan(torch.exp(normal) / sigma_data)


def sample_timesteps(
    scheme: str,
    batch_size: int,
    *,
    num_train_timesteps: int = NUM_TRAIN_TIMESTEPS,
    generator: torch.Generator | None = None,
    **density: float,
) -> Tensor:
    """Draws the training index of every sample of a batch; `flow.training_sigmas` turns it into a noise level.

    A uniform index is always drawn first and then replaced: the official trainer does so, and a run with its seed
    sees the same noise levels.

    Args:
        scheme: "uniform", "logit_normal" or "mode".
        batch_size: B.
        num_train_timesteps: indices run from 0 to this minus 1.
        generator: on the CPU.
        **density: options of `sample_density`.

    Returns:
        (B,) int64 on the CPU.
    """
    uniform = torch.randint(0, num_train_timesteps, (batch_size,), generator=generator)
    scheme = _SYNONYMS.get(str(scheme).lower(), scheme)
    if scheme == "uniform":
        return uniform
    if scheme == "logit_normal_trigflow":
        raise ValueError("TrigFlow trains on angles, not on indices; use sample_density('logit_normal_trigflow', ...).")
    u = sample_density(scheme, batch_size, generator=generator, **density)
    return (u * num_train_timesteps).long().clamp_(0, num_train_timesteps - 1)
