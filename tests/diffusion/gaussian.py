"""A Gaussian target, for which every process has an exact solution: the judge of the samplers. No test is here."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sana.diffusion.noise_schedule import NoiseSchedule


class GaussianTarget:
    """Data N(means, widths^2) with 16 independent coordinates, seen through a noise schedule, in float64."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule
        self.means = torch.linspace(-2, 2, 16, dtype=torch.float64)
        self.widths = torch.linspace(0.3, 1.5, 16, dtype=torch.float64)
        self.start = torch.randn(4, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def spread(self, time: Tensor) -> Tensor:
        return torch.sqrt((self.schedule.alpha(time) * self.widths) ** 2 + self.schedule.sigma(time) ** 2)

    def state(self, time: Tensor) -> Tensor:
        """Returns the exact state at a 0-d time of the trajectories that `start` names: (4, 16)."""
        return self.schedule.alpha(time) * self.means + self.spread(time) * self.start

    def data(self, latents: Tensor, time: Tensor) -> Tensor:
        """Returns the mean of the data given noisy latents."""
        alpha = self.schedule.alpha(time)
        return self.means + alpha * (self.widths / self.spread(time)) ** 2 * (latents - alpha * self.means)

    def noise(self, latents: Tensor, time: Tensor) -> Tensor:
        """Returns the mean of the noise given noisy latents."""
        return (latents - self.schedule.alpha(time) * self.data(latents, time)) / self.schedule.sigma(time)

    def velocity(self, latents: Tensor, sigma: Tensor) -> Tensor:
        """Returns the velocity of the flow process."""
        return (latents - self.data(latents, sigma)) / sigma.double()

    def lambda_grid(self, lowest: float, highest: float, steps: int) -> Tensor:
        """Returns times that are uniform in half log-SNR: (steps + 1,) float64."""
        return self.schedule.inverse_log_snr(torch.linspace(lowest, highest, steps + 1, dtype=torch.float64))

    def error(self, result: Tensor, time: Tensor) -> float:
        """Returns the greatest error of a result that should be the state at `time`."""
        return float((result - self.state(time)).abs().max())


def slopes(error_of: Callable[[int], float], steps: Sequence[int]) -> list[float]:
    """Returns the measured orders of convergence between neighbouring numbers of steps."""
    errors = [error_of(count) for count in steps]
    return [math.log(errors[i] / errors[i + 1]) / math.log(steps[i + 1] / steps[i]) for i in range(len(steps) - 1)]
