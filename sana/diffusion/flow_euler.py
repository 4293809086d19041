"""Flow-Euler: the first-order sampler of flow matching, on diffusers' FlowMatchEuler grid. No guidance is here."""

import numpy as np
import torch
from torch import Tensor

from sana.diffusion.flow import NUM_TRAIN_TIMESTEPS, check_flow_shift
from sana.diffusion.sampler import Generators, ModelFn, Sampler, StepCallback, check_steps, report


def times(num_inference_steps: int, *, flow_shift: float = 3.0) -> Tensor:
    """Returns the noise levels of the model calls, and 0.

    They are uniform between 1 and the SHIFTED least training level, and then shifted (again): the official grid comes
    out so. It is computed in float64 and float32 exactly as there, for truncated timesteps depend on the last bit.

    Args:
        num_inference_steps: N.
        flow_shift: moves the levels towards noise.

    Returns:
        (N + 1,) float32 on the CPU, from 1 to 0.
    """
    check_steps(num_inference_steps)
    check_flow_shift(flow_shift)
    finest = np.float32(1 / NUM_TRAIN_TIMESTEPS)
    least = float(flow_shift * finest / (1 + (flow_shift - 1) * finest))
    sigma = np.linspace(NUM_TRAIN_TIMESTEPS, least * NUM_TRAIN_TIMESTEPS, num_inference_steps) / NUM_TRAIN_TIMESTEPS
    sigma = flow_shift * sigma / (1 + (flow_shift - 1) * sigma)
    return torch.cat([torch.from_numpy(sigma).float(), torch.zeros(1)])


def sample(
    velocity_fn: ModelFn,
    noise: Tensor,
    times: Tensor,
    *,
    generator: Generators = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Integrates dx = velocity dsigma by Euler's method.

    Args:
        velocity_fn: (latents, sigma 0-d) -> velocity like `latents`.
        noise: (B, C, H, W), the state at times[0].
        times: (N + 1,) falling noise levels.
        generator: not used; the sampler is deterministic.
        callback: see `Sampler`.

    Returns:
        Latents like `noise`.
    """
    latents = noise
    for i in range(len(times) - 1):
        latents = latents + float(times[i + 1] - times[i]) * velocity_fn(latents, times[i])
        latents = report(callback, i, times[i], latents)
    return latents


SAMPLER = Sampler(times, sample, prediction="velocity")
