"""SCM and TrigFlow sampling of distilled models (Sana-Sprint) in 1 to 4 steps. No guidance is here.

TrigFlow: x_t = cos(t) * latents + sin(t) * sigma_data * noise for t in [0, pi/2]; the network F predicts
dx/dt / sigma_data, so that latents = cos(t) * x - sin(t) * sigma_data * F (sCM, Lu and Song 2024, section 3.1).
"""

import math

import torch
from torch import Tensor

from sana.diffusion.sampler import Generators, ModelFn, Sampler, StepCallback, check_steps, report
from sana.utils.seed import randn

MAX_TIME = 1.57080  # pi/2 as the released models round it


def times(
    num_inference_steps: int,
    *,
    max_timesteps: float = MAX_TIME,
    intermediate_timesteps: float | None = None,
) -> Tensor:
    """Returns the angles of the model calls, and 0.

    Args:
        num_inference_steps: N.
        max_timesteps: the first angle, in (0, 1.5708].
        intermediate_timesteps: the second angle of exactly two steps (1.3 in the released models); other numbers of
            steps are always uniform.

    Returns:
        (N + 1,) float32 on the CPU, falling.

    Raises:
        ValueError: an angle out of range.
    """
    check_steps(num_inference_steps)
    if not 0 < max_timesteps <= MAX_TIME:
        raise ValueError(f"max_timesteps must be in (0, {MAX_TIME}], not {max_timesteps}.")
    if num_inference_steps == 2 and intermediate_timesteps is not None:
        if not 0 < intermediate_timesteps < max_timesteps:
            raise ValueError(f"intermediate_timesteps must be in (0, {max_timesteps}), not {intermediate_timesteps}.")
        return torch.tensor([max_timesteps, intermediate_timesteps, 0.0])
    return torch.linspace(max_timesteps, 0, num_inference_steps + 1)


def sample(
    trigflow_fn: ModelFn,
    noise: Tensor,
    times: Tensor,
    *,
    sigma_data: float = 0.5,
    generator: Generators = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Alternates a prediction of the latents and new noise of the next level (consistency sampling).

    Noise is drawn after every step, the last and only one included, so that a seed gives the released pictures.

    Args:
        trigflow_fn: (latents / sigma_data, angle 0-d) -> F, both with unit variance.
        noise: (B, C, H, W) standard normal.
        times: (N + 1,) falling angles.
        sigma_data: standard deviation of the latents the network was trained on.
        generator: one, or one for each image; the source of the noise.
        callback: see `Sampler`; its latents have variance sigma_data squared.

    Returns:
        Latents like `noise`: the last prediction divided by sigma_data.
    """
    latents = denoised = noise * sigma_data
    for i in range(len(times) - 1):
        angle, following = float(times[i]), float(times[i + 1])
        prediction = sigma_data * trigflow_fn(latents / sigma_data, times[i])
        denoised = math.cos(angle) * latents - math.sin(angle) * prediction
        fresh = randn(noise.shape, generator, noise.device, noise.dtype) * sigma_data
        latents = math.cos(following) * denoised + math.sin(following) * fresh
        latents = report(callback, i, times[i], latents)
    return denoised / sigma_data


def sample_trigflow(
    trigflow_fn: ModelFn,
    noise: Tensor,
    times: Tensor,
    *,
    sigma_data: float = 0.5,
    generator: Generators = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Rotates the latents along the predicted velocity: the deterministic first-order step of TrigFlow.

    Args:
        trigflow_fn: see `sample`.
        noise: see `sample`.
        times: see `sample`.
        sigma_data: see `sample`.
        generator: not used.
        callback: see `sample`.

    Returns:
        Latents like `noise`, divided by sigma_data.
    """
    latents = noise * sigma_data
    for i in range(len(times) - 1):
        turn = float(times[i]) - float(times[i + 1])
        prediction = sigma_data * trigflow_fn(latents / sigma_data, times[i])
        latents = math.cos(turn) * latents - math.sin(turn) * prediction
        latents = report(callback, i, times[i], latents)
    return latents / sigma_data


SAMPLER = Sampler(times, sample, prediction="trigflow")
TRIGFLOW_SAMPLER = Sampler(times, sample_trigflow, prediction="trigflow")
