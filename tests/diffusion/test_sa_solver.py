"""SA-Solver: order without noise, distribution with noise, and its use of the generator."""

import pytest
import torch
from torch import Tensor

from sana.diffusion.dpm_solver import NETWORK_DELAY
from sana.diffusion.noise_schedule import VPSchedule
from sana.diffusion.sa_solver import sample, times
from tests.diffusion.gaussian import GaussianTarget, slopes


def noise_model(target: GaussianTarget):
    return lambda latents, time: target.noise(latents, time.double() + NETWORK_DELAY)


def test_second_order_without_noise() -> None:
    target = GaussianTarget(VPSchedule())

    def error_of(steps: int) -> float:
        grid = target.lambda_grid(-4, 3, steps)
        return target.error(sample(noise_model(target), target.state(grid[0]), grid, eta=0.0), grid[-1])

    assert min(slopes(error_of, [20, 40, 80])) >= 1.8


def test_noise_keeps_the_distribution_of_the_data() -> None:
    target = GaussianTarget(VPSchedule())
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(2000, 16, generator=generator, dtype=torch.float64)
    result = sample(noise_model(target), start, times(30), eta=1.0, generator=generator)
    last = times(30)[-1]
    torch.testing.assert_close(result.mean(0), target.schedule.alpha(last) * target.means, rtol=0, atol=0.12)
    torch.testing.assert_close(result.std(0), target.spread(last), rtol=0.08, atol=0.0)
    again = sample(noise_model(target), start, times(30), eta=1.0, generator=generator)
    assert (again - result).abs().mean() > 0.1  # the same start, other noise


def test_one_call_a_step_and_every_step_draws_noise() -> None:
    class CountingModel:
        calls = 0

        def __call__(self, latents: Tensor, time: Tensor) -> Tensor:
            self.calls += 1
            return latents

    model, generator, twin = CountingModel(), torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    sample(model, torch.ones(2, 3), times(5), eta=0.0, generator=generator)
    assert model.calls == 5
    for _ in range(6):
        torch.randn(2, 3, generator=twin)
    assert torch.equal(generator.get_state(), twin.get_state())


def test_rows_with_their_own_generators_do_not_depend_on_the_batch() -> None:
    target = GaussianTarget(VPSchedule())
    together = sample(
        noise_model(target),
        target.start,
        times(6),
        generator=[torch.Generator().manual_seed(seed) for seed in range(4)],
    )
    for row in range(4):
        alone = sample(
            noise_model(target), target.start[row : row + 1], times(6), generator=[torch.Generator().manual_seed(row)]
        )
        assert torch.equal(alone, together[row : row + 1])


@pytest.mark.parametrize(("end", "noisy"), [(0.81, False), (0.8, True), (0.5, True), (0.2, True), (0.19, False)])
def test_noise_is_added_between_times_0_2_and_0_8_ends_included(end: float, noisy: bool) -> None:
    def one_step(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return sample(lambda x, t: x, torch.ones(1, 4), torch.tensor([0.9, end]), eta=1.0, generator=generator)

    assert torch.equal(one_step(1), one_step(2)) != noisy


def test_a_negative_eta_is_an_error() -> None:
    with pytest.raises(ValueError, match="eta"):
        sample(lambda latents, time: latents, torch.ones(1, 2), times(2), eta=-1.0)
