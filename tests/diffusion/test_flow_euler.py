"""Flow-Euler: its grid against diffusers' scheduler, its order against an exact solution."""

import pytest
import torch

from sana.diffusion.flow_euler import sample, times
from sana.diffusion.noise_schedule import FlowSchedule
from tests.diffusion.gaussian import GaussianTarget, slopes


@pytest.mark.parametrize("flow_shift", [1.0, 2.5, 3.0, 4.0, 6.0])
def test_grid_and_timesteps_equal_diffusers_to_the_last_bit(flow_shift: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    for steps in (1, 2, 5, 14, 20, 28, 50):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=flow_shift)
        scheduler.set_timesteps(steps)
        ours = times(steps, flow_shift=flow_shift)
        assert torch.equal(ours, scheduler.sigmas), steps
        assert torch.equal(ours[:-1] * 1000, scheduler.timesteps), steps


def test_flow_shift_takes_effect() -> None:
    assert (times(10, flow_shift=3.0)[1:-1] > times(10, flow_shift=1.0)[1:-1]).all()


def test_order_of_convergence() -> None:
    target = GaussianTarget(FlowSchedule())

    def error_of(steps: int) -> float:
        grid = torch.linspace(0.95, 0.05, steps + 1, dtype=torch.float64)
        return target.error(sample(target.velocity, target.state(grid[0]), grid), grid[-1])

    assert min(slopes(error_of, [40, 80, 160])) >= 0.9


def test_a_constant_velocity_is_followed_exactly() -> None:
    noise, velocity = torch.randn(2, 2, 3, dtype=torch.float64)
    result = sample(lambda latents, sigma: velocity, noise, torch.tensor([1.0, 0.7, 0.2, 0.0], dtype=torch.float64))
    torch.testing.assert_close(result, noise - velocity)


def test_the_callback_can_replace_the_latents() -> None:
    seen: list[tuple[int, float]] = []

    def callback(index: int, time: float, latents: torch.Tensor) -> torch.Tensor | None:
        seen.append((index, time))
        return torch.zeros_like(latents) if index == 1 else None

    result = sample(lambda latents, sigma: latents, torch.ones(1, 2), torch.tensor([1.0, 0.5, 0.0]), callback=callback)
    assert seen == [(0, 1.0), (1, 0.5)]
    assert result.tolist() == [[0.0, 0.0]]


def test_bad_arguments_are_errors() -> None:
    with pytest.raises(ValueError, match="positive integer"):
        times(0)
    with pytest.raises(ValueError, match="flow_shift"):
        times(4, flow_shift=0)
