"""Noise schedules over continuous time (flow matching, variance preserving) and grids of times. No solver is here.

Both describe x_t = alpha(t) * latents + sigma(t) * noise for t in [0, 1]; lambda(t) = log(alpha / sigma) is the half
log-SNR in which DPM-Solver++ steps (Lu et al. 2022). Everything is computed in float64.
"""

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from sana.diffusion.flow import sampling_sigmas

SKIP_TYPES = ("time_uniform_flow", "time_uniform", "time_quadratic", "logSNR")


class NoiseSchedule(Protocol):
    """Times in, coefficients out; any shape, float64."""

    def alpha(self, time: Tensor) -> Tensor: ...

    def sigma(self, time: Tensor) -> Tensor: ...

    def log_snr(self, time: Tensor) -> Tensor:
        """Returns lambda = log(alpha / sigma), falling in time; infinite where alpha or sigma is 0."""

    def inverse_log_snr(self, log_snr: Tensor) -> Tensor:
        """Returns the time of a lambda."""


class FlowSchedule:
    """alpha = 1 - t, sigma = t. At t = 1 nothing of the latents is left (lambda = -inf), at t = 0 no noise (+inf)."""

    def alpha(self, time: Tensor) -> Tensor:
        return 1 - time.double()

    def sigma(self, time: Tensor) -> Tensor:
        return time.double()

    def log_snr(self, time: Tensor) -> Tensor:
        return torch.log(self.alpha(time)) - torch.log(self.sigma(time))

    def inverse_log_snr(self, log_snr: Tensor) -> Tensor:
        # sigma = 1 / (1 + alpha / sigma); exp(-lambda) alone would be the inverse for an exploding-variance process
        return torch.sigmoid(-log_snr.double())


class VPSchedule:
    """The discrete variance-preserving process of DDPM, log(alpha) interpolated linearly between its steps.

    Step i of the process is at time (i + 1) / 1000; the network's timestep is time * 1000 - 1.

    Args:
        betas: (N,) variances added by each step; the "linear" schedule (1e-4 to 0.02 in 1000 steps) when None.
    """

    def __init__(self, betas: Tensor | None = None) -> None:
        self._betas = betas

    @cached_property
    def _log_alphas(self) -> Tensor:
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64) if self._betas is None else self._betas.double()
        return 0.5 * torch.log(1 - betas).cumsum(0)

    @cached_property
    def _times(self) -> Tensor:
        return torch.linspace(0, 1, len(self._log_alphas) + 1, dtype=torch.float64)[1:]

    def alpha(self, time: Tensor) -> Tensor:
        return torch.exp(self._log_alpha(time))

    def sigma(self, time: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self._log_alpha(time)))

    def log_snr(self, time: Tensor) -> Tensor:
        return self._log_alpha(time) - torch.log(self.sigma(time))

    def inverse_log_snr(self, log_snr: Tensor) -> Tensor:
        log_alpha = -0.5 * torch.nn.functional.softplus(-2 * log_snr.double())
        return _interpolate(log_alpha, self._log_alphas.flip(0), self._times.flip(0))

    def _log_alpha(self, time: Tensor) -> Tensor:
        return _interpolate(time.double(), self._times, self._log_alphas)


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Piecewise linear through (xs, ys), xs rising; beyond the ends the outermost pieces go on."""
    right = torch.searchsorted(xs, x.contiguous()).clamp(1, len(xs) - 1)
    x0, x1, y0, y1 = xs[right - 1], xs[right], ys[right - 1], ys[right]
    return y0 + (x - x0) * (y1 - y0) / (x1 - x0)


def time_grid(
    skip_type: str,
    num_steps: int,
    schedule: NoiseSchedule,
    *,
    first: float = 1.0,
    last: float = 0.001,
    flow_shift: float = 1.0,
) -> Tensor:
    """Returns times that fall from `first` to `last`.

    Args:
        skip_type: "time_uniform_flow" (Sana's shifted grid, see `flow.sampling_sigmas`; its ends are 0.999 shifted, and
            0), "time_uniform", "time_quadratic" (uniform in sqrt(t)) or "logSNR" (uniform in lambda).
        num_steps: N.
        schedule: defines lambda for "logSNR".
        first: noisiest time.
        last: cleanest time.
        flow_shift: only for "time_uniform_flow".

    Returns:
        (N + 1,) float32.

    Raises:
        ValueError: unknown skip type, or "logSNR" with an end whose lambda is infinite.
    """
    if skip_type == "time_uniform_flow":
        return sampling_sigmas(num_steps, flow_shift, first, last)
    if skip_type == "time_uniform":
        return torch.linspace(first, last, num_steps + 1)
    if skip_type == "time_quadratic":
        return torch.linspace(first**0.5, last**0.5, num_steps + 1).pow(2)
    if skip_type != "logSNR":
        raise ValueError(f"Unknown skip type {skip_type!r}; known: {', '.join(SKIP_TYPES)}.")
    ends = schedule.log_snr(torch.tensor([first, last], dtype=torch.float64))
    if not bool(torch.isfinite(ends).all()):
        raise ValueError(
            f"Skip type 'logSNR' needs ends with a finite log-SNR, and those of times {first} and {last} are "
            f"{ends.tolist()}; on the flow schedule choose a first time below 1 and a last time above 0."
        )
    uniform = torch.linspace(float(ends[0]), float(ends[1]), num_steps + 1, dtype=torch.float64)
    return schedule.inverse_log_snr(uniform).float()
