"""DPM-Solver++ on the VP process against the exact solution and against diffusers."""

import pytest
import torch
from torch import Tensor

from sana.diffusion.dpm_solver import NETWORK_DELAY, sample, times
from sana.diffusion.noise_schedule import VPSchedule
from tests.diffusion.gaussian import GaussianTarget


def noise_model(target: GaussianTarget):
    """The target's noise as a network's function: its time lags by one step of the process."""
    return lambda latents, time: target.noise(latents, time.double() + NETWORK_DELAY)


@pytest.mark.parametrize("method", ["multistep", "singlestep", "adaptive"])
@pytest.mark.parametrize("skip_type", ["time_uniform", "time_quadratic", "logSNR"])
def test_every_method_and_grid_reaches_the_exact_solution(method: str, skip_type: str) -> None:
    target = GaussianTarget(VPSchedule())
    grid = times(60, skip_type=skip_type, method=method)
    result = sample(noise_model(target), target.state(grid[0]), grid, method=method)
    assert target.error(result, grid[-1]) < (0.25 if method == "adaptive" else 0.03)


def test_network_timesteps_run_from_999_to_the_first_step() -> None:
    seen: list[float] = []

    def noise(latents: Tensor, time: Tensor) -> Tensor:
        seen.append(float(time * 1000))
        return torch.zeros_like(latents)

    sample(noise, torch.zeros(1, 2), times(4))
    assert seen == pytest.approx([999, 749.25, 499.5, 249.75], abs=1e-3)


def test_denoise_to_zero_returns_a_prediction() -> None:
    target, grid = GaussianTarget(VPSchedule()), times(20)
    plain = sample(noise_model(target), target.state(grid[0]), grid)
    denoised = sample(noise_model(target), target.state(grid[0]), grid, denoise_to_zero=True)
    torch.testing.assert_close(denoised, target.data(plain, grid[-1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_diffusers_solver_on_the_same_times_agrees(order: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, solver_order=order, final_sigmas_type="sigma_min"
    )
    scheduler.set_timesteps(timesteps=[999, 799, 599, 399, 199, 99, 49])
    grid = torch.cat([(scheduler.timesteps + 1) / 1000, torch.tensor([0.001])])
    target = GaussianTarget(VPSchedule())
    latents = noise = target.state(grid[0]).float()
    for timestep in scheduler.timesteps:
        prediction = target.noise(latents, (timestep + 1) / 1000).float()
        latents = scheduler.step(prediction, timestep, latents).prev_sample
    ours = sample(lambda x, t: noise_model(target)(x, t).float(), noise, grid, order=order)
    torch.testing.assert_close(ours, latents, rtol=2e-3, atol=2e-3)


def test_the_flow_grid_is_an_error_here() -> None:
    with pytest.raises(ValueError, match="flow process"):
        times(4, skip_type="time_uniform_flow")
