"""DPM-Solver++ on the variance-preserving process, for models that predict noise. No guidance is here."""

import torch
from torch import Tensor

from sana.diffusion.dpm_methods import DPMOptions, make_times, solve
from sana.diffusion.noise_schedule import VPSchedule
from sana.diffusion.sampler import Generators, ModelFn, Sampler, StepCallback

NETWORK_DELAY = 0.001  # step i of the process is at time (i + 1) / 1000 and is timestep i of the network
_SCHEDULE = VPSchedule()


def data_from_noise(schedule: VPSchedule, latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """Returns the latents that a noise prediction implies at a 0-d time: (x - sigma * noise) / alpha."""
    return (latents - float(schedule.sigma(time)) * noise) / float(schedule.alpha(time))


def times(
    num_inference_steps: int,
    *,
    flow_shift: float | None = None,
    skip_type: str = "time_uniform",
    first: float = 1.0,
    last: float = 0.001,
    method: str = "multistep",
    order: int = 2,
) -> Tensor:
    """Returns the times of the model calls, and the end.

    Args:
        num_inference_steps: N, the number of model calls.
        flow_shift: not used, for this process has none; taken so that all samplers are called alike.
        skip_type: "time_uniform", "time_quadratic" or "logSNR".
        first: see `noise_schedule.time_grid`.
        last: see `noise_schedule.time_grid`.
        method: see `DPMOptions`.
        order: see `DPMOptions`.

    Returns:
        (N + 1,) float32 on the CPU, falling.
    """
    if skip_type == "time_uniform_flow":
        raise ValueError("Skip type 'time_uniform_flow' is for the flow process; use 'time_uniform' or 'logSNR' here.")
    return make_times(
        num_inference_steps, _SCHEDULE, skip_type=skip_type, first=first, last=last, method=method, order=order
    )


def sample(
    noise_fn: ModelFn,
    noise: Tensor,
    times: Tensor,
    *,
    generator: Generators = None,
    callback: StepCallback | None = None,
    denoise_to_zero: bool = False,
    **options: str | int | bool,
) -> Tensor:
    """Integrates the process from noise to latents.

    Args:
        noise_fn: (latents, time - 0.001) -> predicted noise like `latents`; its time, times 1000, is the timestep.
        noise: (B, C, H, W), the state at times[0].
        times: (N + 1,) from `times`.
        generator: not used; the solver is deterministic.
        callback: see `Sampler`.
        denoise_to_zero: whether to replace the result by one more prediction, made at the last time.
        **options: of `DPMOptions`.

    Returns:
        Latents like `noise`.
    """

    def predict_data(latents: Tensor, time: Tensor) -> Tensor:
        return data_from_noise(_SCHEDULE, latents, noise_fn(latents, time - NETWORK_DELAY), time)

    latents = solve(predict_data, _SCHEDULE, noise, times, DPMOptions(**options), callback)  # type: ignore[arg-type]
    return predict_data(latents, torch.as_tensor(times[-1])) if denoise_to_zero else latents


SAMPLER = Sampler(times, sample, prediction="noise")
