"""Flow-DPM-Solver: accuracy against Euler and against diffusers, its grids and its options."""

import pytest
import torch
from torch import Tensor

from sana.diffusion import SAMPLERS
from sana.diffusion.flow import noise_from_velocity
from sana.diffusion.flow_dpm_solver import sample, times
from sana.diffusion.noise_schedule import FlowSchedule
from tests.diffusion.gaussian import GaussianTarget, slopes


def mixture_velocity(latents: Tensor, sigma: Tensor) -> Tensor:
    """Exact velocity for two narrow clusters in two dimensions: what a prompt with two answers looks like."""
    level = float(sigma)
    alpha, width = 1 - level, 0.2
    centres = torch.tensor([[1.0, 1.0], [-1.0, 0.5]], dtype=torch.float64)
    variance = alpha**2 * width**2 + level**2
    offset = latents[:, None] - alpha * centres  # (B, 2, 2)
    weight = torch.softmax(-offset.square().sum(-1) / (2 * variance), dim=1)[..., None]
    data = (weight * (centres + alpha * width**2 / variance * offset)).sum(1)
    return (latents - data) / level


@pytest.mark.parametrize(("target", "flow_shift"), [("gaussian", 1.0), ("gaussian", 3.0), ("mixture", 1.0)])
def test_second_order_at_14_steps_beats_euler_at_28(target: str, flow_shift: float) -> None:
    """On the official grids. It does not hold for every target: with shift 3 the last of 14 steps starts at sigma 0.19,
    and clusters much narrower than that (width 0.2, as here) are drawn better by Euler's 28.
    """
    noise = torch.randn(64, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = mixture_velocity
    if target == "gaussian":
        gaussian = GaussianTarget(FlowSchedule())
        noise, model = gaussian.start, gaussian.velocity
    reference = sample(model, noise, times(1000, flow_shift=flow_shift), order=2)
    euler = SAMPLERS["flow_euler"]
    euler_result = euler.sample(model, noise, euler.times(28, flow_shift=flow_shift))
    ours = sample(model, noise, times(14, flow_shift=flow_shift), order=2)
    assert (ours - reference).abs().mean() < (euler_result - reference).abs().mean()
    assert (ours - reference).square().mean() < (euler_result - reference).square().mean()


@pytest.mark.parametrize(
    ("order", "solver_type", "least"), [(1, "dpmsolver", 0.9), (2, "dpmsolver", 1.8), (3, "adams", 2.6)]
)
def test_order_of_convergence_on_a_uniform_log_snr_grid(order: int, solver_type: str, least: float) -> None:
    target = GaussianTarget(FlowSchedule())

    def error_of(steps: int) -> float:
        grid = target.lambda_grid(-6, 6, steps)
        result = sample(target.velocity, target.state(grid[0]), grid, order=order, solver_type=solver_type)
        return target.error(result, grid[-1])

    assert min(slopes(error_of, [20, 40, 80, 160])) >= least


def test_log_snr_grid() -> None:
    grid = times(10, skip_type="logSNR", first=0.99, last=0.01)
    lambdas = FlowSchedule().log_snr(grid)
    torch.testing.assert_close(lambdas.diff(), lambdas.diff().mean().expand(10), rtol=1e-4, atol=0)
    assert grid[[0, -1]].tolist() == pytest.approx([0.99, 0.01], abs=1e-6)
    with pytest.raises(ValueError, match="below 1"):
        times(10, skip_type="logSNR")


@pytest.mark.parametrize("order", [1, 2, 3])
def test_one_step_of_any_order_is_one_prediction(order: int) -> None:
    target = GaussianTarget(FlowSchedule())
    grid = times(1)
    result = sample(target.velocity, target.start, grid, order=order)
    torch.testing.assert_close(result, target.data(target.start, grid[0]))


def test_guided_noise_and_guided_velocity_agree() -> None:
    target = GaussianTarget(FlowSchedule())

    def noise_fn(latents: Tensor, sigma: Tensor) -> Tensor:
        return noise_from_velocity(latents, target.velocity(latents, sigma), sigma.double())

    by_noise = sample(noise_fn, target.start, times(8), prediction="noise")
    torch.testing.assert_close(by_noise, sample(target.velocity, target.start, times(8)), rtol=1e-9, atol=1e-9)


def test_denoise_to_zero_asks_once_more_at_the_last_time() -> None:
    seen: list[float] = []

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        seen.append(float(sigma))
        return torch.ones_like(latents)

    plain = sample(velocity, torch.zeros(1, 2), times(3))
    assert len(seen) == 3
    denoised = sample(velocity, torch.zeros(1, 2), times(3), denoise_to_zero=True)
    assert seen[-1] == pytest.approx(0.001)
    torch.testing.assert_close(denoised, plain - 0.001)


@pytest.mark.parametrize("method", ["multistep", "singlestep", "adaptive"])
@pytest.mark.parametrize("order", [2, 3])
def test_every_method_reaches_the_same_latents(method: str, order: int) -> None:
    target = GaussianTarget(FlowSchedule())
    grid = times(90, skip_type="logSNR", first=0.99, last=0.01, method=method, order=order)
    result = sample(target.velocity, target.state(grid[0]), grid, method=method, order=order)
    assert target.error(result, grid[-1]) < (0.25 if method == "adaptive" else 0.02)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"order": 0}, "1, 2 or 3"),
        ({"method": "singlestep_fixed"}, "singlestep_fixed"),
        ({"solver_type": "heun"}, "heun"),
        ({"prediction": "data"}, "prediction"),
    ],
)
def test_unknown_options_are_named(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sample(lambda latents, sigma: latents, torch.zeros(1, 2), times(4), **options)


@pytest.mark.parametrize("steps", [0, -1, 2.5])
def test_an_impossible_number_of_steps_is_an_error(steps: int) -> None:
    with pytest.raises(ValueError, match="positive integer"):
        times(steps)


@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize("flow_shift", [1.0, 3.0])
def test_diffusers_grid_gives_diffusers_result(steps: int, flow_shift: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        flow_shift=flow_shift, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    scheduler.set_timesteps(steps)
    target = GaussianTarget(FlowSchedule())
    latents = noise = target.start.float()
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas):
        latents = scheduler.step(target.velocity(latents, sigma).float(), timestep, latents).prev_sample
    ours = sample(lambda x, sigma: target.velocity(x, sigma).float(), noise, scheduler.sigmas)
    torch.testing.assert_close(ours, latents, rtol=1e-4, atol=1e-5)
