"""SCM and TrigFlow: grids, exact trajectories of a Gaussian, agreement with diffusers, and the draws of noise."""

import math

import pytest
import torch
from torch import Tensor

from sana.diffusion.scm import MAX_TIME, sample, sample_trigflow, times

SIGMA_DATA = 0.5


def gaussian_trigflow(latents: Tensor, angle: Tensor) -> Tensor:
    """F for data N(0, (width * sigma_data)^2), latents in units of sigma_data: the velocity of the exact flow."""
    width = 0.4
    cos, sin = math.cos(float(angle)), math.sin(float(angle))
    return latents * cos * sin * (1 - width**2) / (width**2 * cos**2 + sin**2)


def test_times() -> None:
    assert times(1).tolist() == pytest.approx([MAX_TIME, 0])
    assert times(4, max_timesteps=1.2).tolist() == pytest.approx([1.2, 0.9, 0.6, 0.3, 0])
    assert times(2, intermediate_timesteps=1.3).tolist() == pytest.approx([MAX_TIME, 1.3, 0])
    assert torch.equal(times(3, intermediate_timesteps=1.3), times(3))  # matters for two steps only


@pytest.mark.parametrize("options", [{"max_timesteps": 0.0}, {"max_timesteps": 2.0}, {"intermediate_timesteps": 1.6}])
def test_angles_out_of_range_are_errors(options: dict) -> None:
    with pytest.raises(ValueError, match="must be in"):
        times(2, **options)


def test_trigflow_converges_to_the_exact_flow() -> None:
    noise = torch.randn(4, 8, dtype=torch.float64)
    exact = noise * 0.4  # from pi/2, where nothing of the data is left, to 0
    errors = []
    for steps in (50, 100, 200):
        grid = torch.linspace(math.pi / 2, 0, steps + 1, dtype=torch.float64)
        errors.append(float((sample_trigflow(gaussian_trigflow, noise, grid) - exact).abs().max()))
    assert errors[0] / errors[1] > 1.8
    assert errors[1] / errors[2] > 1.8


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_scm_equals_diffusers(steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.SCMScheduler()
    scheduler.set_timesteps(steps, max_timesteps=1.57080, intermediate_timesteps=1.3 if steps == 2 else None)
    noise = torch.randn(2, 4, 4, 4)
    generator = torch.Generator().manual_seed(5)
    latents = noise * SIGMA_DATA
    for timestep in scheduler.timesteps[:-1]:
        prediction = SIGMA_DATA * gaussian_trigflow(latents / SIGMA_DATA, timestep)
        latents, denoised = scheduler.step(prediction, timestep, latents, generator=generator, return_dict=False)
    grid = times(steps, intermediate_timesteps=1.3)
    assert torch.equal(grid, scheduler.timesteps)
    ours = sample(gaussian_trigflow, noise, grid, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(ours, denoised / SIGMA_DATA, rtol=1e-5, atol=1e-6)


def test_noise_is_drawn_after_every_step_the_only_one_too() -> None:
    for steps in (1, 3):
        generator, twin = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
        sample(gaussian_trigflow, torch.ones(2, 8), times(steps), generator=generator)
        for _ in range(steps):
            torch.randn(2, 8, generator=twin)
        assert torch.equal(generator.get_state(), twin.get_state())


def test_rows_with_their_own_generators_do_not_depend_on_the_batch() -> None:
    noise = torch.randn(3, 8)
    together = sample(
        gaussian_trigflow, noise, times(4), generator=[torch.Generator().manual_seed(seed) for seed in range(3)]
    )
    for row in range(3):
        alone = sample(
            gaussian_trigflow, noise[row : row + 1], times(4), generator=[torch.Generator().manual_seed(row)]
        )
        assert torch.equal(alone, together[row : row + 1])


@pytest.mark.parametrize("sampler", [sample, sample_trigflow])
def test_callback_after_every_step(sampler) -> None:
    seen: list[tuple[int, float]] = []
    sampler(
        gaussian_trigflow,
        torch.ones(1, 2),
        times(2),
        callback=lambda index, time, latents: seen.append((index, time)),
    )
    assert [index for index, _ in seen] == [0, 1]
    assert [time for _, time in seen] == pytest.approx([MAX_TIME, MAX_TIME / 2])
