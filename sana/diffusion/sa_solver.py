"""SA-Solver: a stochastic Adams method on the variance-preserving process (Xue et al. 2023). No guidance is here."""

import math

import torch
from torch import Tensor

from sana.diffusion.dpm_solver import NETWORK_DELAY, data_from_noise
from sana.diffusion.noise_schedule import VPSchedule, time_grid
from sana.diffusion.sampler import Generators, ModelFn, Sampler, StepCallback, check_steps, report
from sana.utils.seed import randn

STOCHASTIC_TIMES = (0.2, 0.8)  # noise is added on the way to times between these
_SCHEDULE = VPSchedule()


def times(
    num_inference_steps: int, *, flow_shift: float | None = None, first: float = 1.0, last: float = 0.001
) -> Tensor:
    """Returns uniform times.

    Args:
        num_inference_steps: N, the number of model calls.
        flow_shift: not used, for this process has none; taken so that all samplers are called alike.
        first: noisiest time.
        last: cleanest time.

    Returns:
        (N + 1,) float32 on the CPU, falling.
    """
    check_steps(num_inference_steps)
    return time_grid("time_uniform", num_inference_steps, _SCHEDULE, first=first, last=last)


def sample(
    noise_fn: ModelFn,
    noise: Tensor,
    times: Tensor,
    *,
    eta: float = 1.0,
    generator: Generators = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Integrates the process with a two-step predictor and a corrector, one model call a step (mode PEC).

    The first and the last predictor are of order 1, the last step is not corrected.

    Args:
        noise_fn: (latents, time - 0.001) -> predicted noise like `latents`; its time, times 1000, is the timestep.
        noise: (B, C, H, W), the state at times[0].
        times: (N + 1,) from `times`.
        eta: tau of the paper where times are stochastic: 0 solves the ODE, 1 the reverse SDE.
        generator: one, or one for each image; drawn from once before the first step and in every step, eta 0 included.
        callback: see `Sampler`.

    Returns:
        Latents like `noise`.

    Raises:
        ValueError: eta is negative.
    """
    if not eta >= 0:
        raise ValueError(f"eta must be at least 0, not {eta}.")

    def predict_data(latents: Tensor, time: Tensor) -> Tensor:
        return data_from_noise(_SCHEDULE, latents, noise_fn(latents, time - NETWORK_DELAY), time)

    steps = len(times) - 1
    lambdas = _SCHEDULE.log_snr(times).tolist()
    latents = noise
    randn(noise.shape, generator, noise.device, noise.dtype)  # the official sampler draws once more than it uses
    data, slope = predict_data(latents, times[0]), torch.zeros_like(noise)
    for i in range(steps):
        fresh = randn(noise.shape, generator, noise.device, noise.dtype)
        last_step = i == steps - 1
        span = _Span(times[i : i + 2], eta)
        predicted = span.move(latents, data, torch.zeros_like(slope) if last_step else slope, fresh)
        if not last_step:
            following = predict_data(predicted, times[i + 1])
            slope = (following - data) / (lambdas[i + 1] - lambdas[i])
            predicted = span.move(latents, data, slope, fresh)
            data = following
        latents = report(callback, i, times[i], predicted)
    return latents


class _Span:
    """The update over one pair of times: equations 14 and 17 of the paper for predictions that are linear in lambda.

    The weight of the slope is (1 + tau^2) h^2 / 2 instead of the exact integral, from which it differs by O(h^3): the
    paper's form for few steps.

    Args:
        times: (2,), from and to.
        eta: tau where it is not 0.
    """

    def __init__(self, times: Tensor, eta: float) -> None:
        lower, upper = STOCHASTIC_TIMES
        inside = bool(times[1] >= lower) and bool(times[1] <= upper)  # in the precision of the times, ends included
        tau = eta if inside else 0.0
        start, end = _SCHEDULE.log_snr(times).tolist()
        sigma_start, sigma_end = _SCHEDULE.sigma(times).tolist()
        alpha_end = float(_SCHEDULE.alpha(times[1]))
        h, rate = end - start, 1 + tau**2
        self.keep = math.exp(-(tau**2) * h) * sigma_end / sigma_start
        self.data = -alpha_end * math.expm1(-rate * h)
        self.slope = alpha_end * rate * h * h / 2
        self.noise = sigma_end * math.sqrt(-math.expm1(-2 * tau**2 * h))

    def move(self, latents: Tensor, data: Tensor, slope: Tensor, noise: Tensor) -> Tensor:
        """Returns the latents at the end of the span, given the prediction at its start and its slope in lambda."""
        return self.keep * latents + self.data * data + self.slope * slope + self.noise * noise


SAMPLER = Sampler(times, sample, prediction="noise")
