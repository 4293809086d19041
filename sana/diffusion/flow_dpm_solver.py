"""Flow-DPM-Solver: DPM-Solver++ on the flow-matching process (Sana, section 2.4, algorithm 1). No guidance is here."""

import torch
from torch import Tensor

from sana.diffusion.dpm_methods import DPMOptions, make_times, solve
from sana.diffusion.flow import data_from_velocity
from sana.diffusion.noise_schedule import FlowSchedule
from sana.diffusion.sampler import Generators, ModelFn, Sampler, StepCallback

_SCHEDULE = FlowSchedule()
_DENOISE_TIME = 0.001  # where `denoise_to_zero` asks the model once more


def times(
    num_inference_steps: int,
    *,
    flow_shift: float = 3.0,
    skip_type: str = "time_uniform_flow",
    first: float = 1.0,
    last: float = 0.001,
    method: str = "multistep",
    order: int = 2,
) -> Tensor:
    """Returns the noise levels of the model calls, and the end.

    Args:
        num_inference_steps: N, the number of model calls.
        flow_shift: moves the levels towards noise; only "time_uniform_flow" uses it. 3 for most released models.
        skip_type: see `noise_schedule.time_grid`. "logSNR" needs `first` below 1.
        first: see `noise_schedule.time_grid`.
        last: see `noise_schedule.time_grid`.
        method: see `DPMOptions`.
        order: see `DPMOptions`.

    Returns:
        (N + 1,) float32 on the CPU, falling.
    """
    return make_times(
        num_inference_steps,
        _SCHEDULE,
        skip_type=skip_type,
        flow_shift=flow_shift,
        first=first,
        last=last,
        method=method,
        order=order,
    )


def sample(
    velocity_fn: ModelFn,
    noise: Tensor,
    times: Tensor,
    *,
    prediction: str = "velocity",
    generator: Generators = None,
    callback: StepCallback | None = None,
    denoise_to_zero: bool = False,
    **options: str | int | bool,
) -> Tensor:
    """Integrates the flow from noise to latents.

    A velocity v becomes predicted latents x - sigma * v. The official sampler guides the implied noise and divides by
    1 - sigma: the same number in exact arithmetic, and with `prediction="noise"` the same in float32, whose rounding
    errors are some hundred times greater there near sigma 1.

    Args:
        velocity_fn: (latents, sigma 0-d) -> velocity (or noise) like `latents`.
        noise: (B, C, H, W), the state at times[0].
        times: (N + 1,) noise levels from `times`.
        prediction: "velocity", or "noise" for a model wrapped by `guidance.noise_branches`.
        generator: not used; the solver is deterministic.
        callback: see `Sampler`.
        denoise_to_zero: whether to replace the result by one more prediction, made at sigma 0.001.
        **options: of `DPMOptions`.

    Returns:
        Latents like `noise`.

    Raises:
        ValueError: an option is unknown.
    """
    if prediction not in ("velocity", "noise"):
        raise ValueError(f"prediction must be 'velocity' or 'noise', not {prediction!r}.")

    def predict_data(latents: Tensor, sigma: Tensor) -> Tensor:
        predicted, level = velocity_fn(latents, sigma), float(sigma)
        if prediction == "velocity":
            return data_from_velocity(latents, predicted, level)
        return (latents - level * predicted) / (1 - level)

    latents = solve(predict_data, _SCHEDULE, noise, times, DPMOptions(**options), callback)  # type: ignore[arg-type]
    return predict_data(latents, torch.tensor(_DENOISE_TIME)) if denoise_to_zero else latents


SAMPLER = Sampler(times, sample, prediction="velocity")
