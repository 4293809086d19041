"""Flow matching: the noise process, its sigma grids, the velocity target and the loss. No solver is here.

The process is x_sigma = (1 - sigma) * latents + sigma * noise with sigma in [0, 1] (1 = noise); networks predict the
velocity noise - latents (Sana, section 2.3; Esser et al. 2024, equations 12 to 14).
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000


def check_flow_shift(flow_shift: float) -> None:
    """Raises ValueError unless `flow_shift` is a positive finite number."""
    if not 0 < flow_shift < float("inf"):
        raise ValueError(f"flow_shift must be a positive number, not {flow_shift}; the released models use 1 to 6.")


def shift_sigma(sigma: Tensor, flow_shift: float) -> Tensor:
    """Moves noise levels towards 1 for large images: s * sigma / (1 + (s - 1) * sigma).

    Esser et al. 2024, equation 23.

    Args:
        sigma: any shape, in [0, 1].
        flow_shift: s > 0; 1 changes nothing.
    """
    return flow_shift * sigma / (1 + (flow_shift - 1) * sigma)


def sampling_sigmas(num_inference_steps: int, flow_shift: float, first: float = 1.0, last: float = 0.001) -> Tensor:
    """Returns Sana's `time_uniform_flow` grid of noise levels.

    The grid starts a little below 1 (alpha is never 0 there) and ends at exactly 0. The order of the float32
    operations decides which integer a truncated timestep becomes, so it is part of the definition.

    Args:
        num_inference_steps: N > 0.
        flow_shift: see `shift_sigma`.
        first: 1 - first is the last noise level.
        last: 1 - last is the first noise level before the shift.

    Returns:
        (N + 1,) float32, falling.
    """
    check_flow_shift(flow_shift)
    sigma = 1.0 - torch.linspace(first, last, num_inference_steps + 1)
    return shift_sigma(sigma, flow_shift).flip(0)


def training_sigmas(flow_shift: float, num_train_timesteps: int = NUM_TRAIN_TIMESTEPS) -> Tensor:
    """Returns the shifted noise level of every training index: (num_train_timesteps,) float64, rising from 0."""
    check_flow_shift(flow_shift)
    sigma = 1.0 - torch.linspace(1.0, 0.001, num_train_timesteps, dtype=torch.float64)
    return shift_sigma(sigma, flow_shift)


@lru_cache(maxsize=16)
def _sigmas_on(device: torch.device, flow_shift: float) -> Tensor:
    """`training_sigmas` on a device, copied there once: the copy makes the host wait."""
    with torch.inference_mode(False):
        return training_sigmas(flow_shift).to(device)


def training_timesteps(sigma: Tensor) -> Tensor:
    """Returns the timesteps that the network sees in training: sigma * 1000 truncated to int64.

    The truncation is part of the released weights; the noise is still added with the exact sigma.

    Args:
        sigma: (B,) float64 from `training_sigmas`.
    """
    return (sigma * NUM_TRAIN_TIMESTEPS).long()


def expand_like(values: Tensor, latents: Tensor) -> Tensor:
    """Returns `values` (B,) or 0-d in the dtype and on the device of `latents` (B, ...), shaped to multiply it."""
    return values.to(device=latents.device, dtype=latents.dtype).reshape(-1, *[1] * (latents.ndim - 1))


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Returns (1 - sigma) * latents + sigma * noise.

    Args:
        latents: (B, C, H, W).
        noise: like `latents`, standard normal.
        sigma: (B,) or 0-d, in [0, 1].
    """
    return expand_like(1 - sigma, latents) * latents + expand_like(sigma, latents) * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """Returns what the network learns: noise - latents, the derivative of `add_noise` by sigma."""
    return noise - latents


def data_from_velocity(noisy: Tensor, velocity: Tensor, sigma: Tensor | float) -> Tensor:
    """Returns the latents that a velocity implies: noisy - sigma * velocity."""
    return noisy - sigma * velocity


def noise_from_velocity(noisy: Tensor, velocity: Tensor, sigma: Tensor | float) -> Tensor:
    """Returns the noise that a velocity implies: noisy + (1 - sigma) * velocity."""
    return noisy + (1 - sigma) * velocity


def flow_loss(prediction: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """Returns the mean squared error of a predicted velocity, one value a sample, in float32.

    Args:
        prediction: (B, C, H, W), any floating dtype.
        latents: like `prediction`.
        noise: like `prediction`.

    Returns:
        (B,) float32 (float64 when the prediction is).
    """
    dtype = torch.float64 if prediction.dtype == torch.float64 else torch.float32
    error = prediction.to(dtype) - velocity_target(latents.to(dtype), noise.to(dtype))
    return error.square().flatten(1).mean(1)


def flow_training_loss(
    model: Callable[..., Tensor], latents: Tensor, noise: Tensor, index: Tensor, flow_shift: float, **model_kwargs: Any
) -> Tensor:
    """Returns the training loss of every sample: noise is added, the velocity predicted and compared.

    Args:
        model: (noisy latents, timesteps (B,) int64, **model_kwargs) -> velocity.
        latents: (B, C, H, W).
        noise: like `latents`, standard normal.
        index: (B,) int64 in [0, 1000), from `timestep_sampling.sample_timesteps`.
        flow_shift: see `shift_sigma`.
        **model_kwargs: captions, mask.

    Returns:
        (B,) float32.
    """
    sigma = _sigmas_on(index.device, flow_shift)[index]
    return flow_loss(model(add_noise(latents, noise, sigma), training_timesteps(sigma), **model_kwargs), latents, noise)
