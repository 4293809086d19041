"""The flow process: grids against their closed forms, training formulas against recorded numbers and calculus."""

import math

import pytest
import torch

from sana.diffusion.flow import (
    add_noise,
    data_from_velocity,
    flow_loss,
    flow_training_loss,
    noise_from_velocity,
    sampling_sigmas,
    shift_sigma,
    training_sigmas,
    training_timesteps,
    velocity_target,
)
from tests.parity.common import Case, load_cases

LOSS_CASES = [case for case in load_cases() if case.kind == "training_loss" and "flow_shift" in case.constructor]


@pytest.mark.parametrize("flow_shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_the_sampling_grid_starts_below_one_and_ends_at_zero(steps: int, flow_shift: float) -> None:
    sigmas = sampling_sigmas(steps, flow_shift)
    assert sigmas.shape == (steps + 1,)
    assert sigmas[-1] == 0
    assert float(sigmas[0]) == pytest.approx(flow_shift * 0.999 / (1 + (flow_shift - 1) * 0.999), rel=1e-6)
    assert bool((sigmas.diff() < 0).all())


def test_truncated_timesteps_of_shift_one_start_at_999() -> None:
    """The product is 999.0 exactly in float32; another order of operations gives 998."""
    assert (sampling_sigmas(4, 1.0) * 1000).long().tolist() == [999, 749, 499, 249, 0]


def test_shift_moves_the_middle_and_keeps_the_ends() -> None:
    sigma = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert shift_sigma(sigma, 3.0).tolist() == [0.0, 0.75, 1.0]
    back = shift_sigma(shift_sigma(torch.linspace(0, 1, 9, dtype=torch.float64), 3.0), 1 / 3)
    torch.testing.assert_close(back, torch.linspace(0, 1, 9, dtype=torch.float64))


@pytest.mark.parametrize("flow_shift", [0.0, -1.0, math.inf, math.nan])
def test_an_impossible_shift_is_an_error(flow_shift: float) -> None:
    with pytest.raises(ValueError, match="flow_shift"):
        sampling_sigmas(4, flow_shift)
    with pytest.raises(ValueError, match="flow_shift"):
        training_sigmas(flow_shift)


@pytest.mark.parametrize("case", LOSS_CASES, ids=lambda case: case.name)
def test_training_numbers_are_the_recorded_ones(case: Case) -> None:
    sigmas = training_sigmas(case.constructor["flow_shift"])
    torch.testing.assert_close(sigmas, case.tensor("out.sigmas_table"), rtol=1e-12, atol=1e-12)
    recorded = case.tensors("in.")
    sigma = sigmas[recorded["t_index"]]
    assert torch.equal(training_timesteps(sigma), case.tensor("out.model_timestep"))
    case.assert_close(add_noise(recorded["x0"], recorded["noise"], sigma), case.tensor("out.x_t"), "noisy latents")
    prediction = recorded["model_out"].clone().requires_grad_()
    loss = flow_loss(prediction, recorded["x0"], recorded["noise"])
    case.assert_close(loss, case.tensor("out.loss_per_sample"), "loss")
    loss.mean().backward()
    case.assert_close(prediction.grad, case.tensor("grad.model_out"), "gradient")


def test_the_velocity_is_the_derivative_of_the_noisy_latents() -> None:
    latents, noise = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    sigma, step = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), 0.01
    slope = (add_noise(latents, noise, sigma + step) - add_noise(latents, noise, sigma - step)) / (2 * step)
    torch.testing.assert_close(velocity_target(latents, noise), slope)


def test_velocity_gives_back_data_and_noise() -> None:
    latents, noise = torch.randn(2, 3, 4, dtype=torch.float64)
    noisy, velocity = add_noise(latents, noise, torch.tensor(0.3)), velocity_target(latents, noise)
    torch.testing.assert_close(data_from_velocity(noisy, velocity, 0.3), latents, rtol=0, atol=1e-7)
    torch.testing.assert_close(noise_from_velocity(noisy, velocity, 0.3), noise, rtol=0, atol=1e-7)


def test_noise_levels_keep_the_dtype_of_the_latents() -> None:
    latents = torch.randn(2, 3, dtype=torch.bfloat16)
    assert add_noise(latents, latents, torch.tensor([0.1, 0.2], dtype=torch.float64)).dtype == torch.bfloat16
    assert flow_loss(latents, latents, latents).dtype == torch.float32


def test_the_training_loss_gives_the_network_truncated_timesteps_and_exact_noise() -> None:
    latents, noise = torch.randn(2, 3, 4, 2, 2)
    index, seen = torch.tensor([0, 500, 999]), {}

    def model(noisy: torch.Tensor, timestep: torch.Tensor, caption: str) -> torch.Tensor:
        seen.update(noisy=noisy, timestep=timestep, caption=caption)
        return velocity_target(latents, noise) + torch.tensor([0.0, 1.0, 2.0])[:, None, None, None]

    loss = flow_training_loss(model, latents, noise, index, 3.0, caption="a fox")
    torch.testing.assert_close(loss, torch.tensor([0.0, 1.0, 4.0]))
    middle = shift_sigma(torch.tensor(500 * 0.999 / 999, dtype=torch.float64), 3.0)
    assert seen["caption"] == "a fox"
    assert seen["timestep"].tolist() == [0, int(middle * 1000), 999]
    torch.testing.assert_close(seen["noisy"][1], add_noise(latents, noise, middle)[1])
