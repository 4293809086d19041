"""Multistep DPM-Solver++ against the exact solution for a Gaussian target."""

import numpy as np
import pytest
import torch

from sana.diffusion.dpm_multistep import multistep, phi_1, phi_2, phi_3
from sana.diffusion.noise_schedule import FlowSchedule, NoiseSchedule, VPSchedule
from tests.diffusion.gaussian import GaussianTarget, slopes


def solve_error(target: GaussianTarget, steps: int, ends: tuple[float, float] = (-6, 6), **options) -> float:
    times = target.lambda_grid(*ends, steps)
    return target.error(multistep(target.data, target.schedule, target.state(times[0]), times, **options), times[-1])


@pytest.mark.parametrize(
    ("order", "solver_type", "least"),
    [
        (1, "dpmsolver", 0.9),
        (2, "dpmsolver", 1.8),
        (2, "taylor", 1.8),
        (2, "adams", 1.8),
        (3, "adams", 2.6),
    ],
)
@pytest.mark.parametrize("lower_order_final", [True, False])
def test_order_of_convergence(order: int, solver_type: str, least: float, lower_order_final: bool) -> None:
    target = GaussianTarget(FlowSchedule())
    options = {"order": order, "solver_type": solver_type, "lower_order_final": lower_order_final}
    assert min(slopes(lambda steps: solve_error(target, steps, **options), [20, 40, 80, 160])) >= least


@pytest.mark.parametrize(("order", "least"), [(1, 0.9), (2, 1.8), (3, 2.6)])
def test_order_of_convergence_on_the_vp_process(order: int, least: float) -> None:
    target = GaussianTarget(VPSchedule())
    options = {"order": order, "solver_type": "adams", "ends": (-5.0, 4.5)}
    assert min(slopes(lambda steps: solve_error(target, steps, **options), [20, 40, 80])) >= least


def test_the_released_third_order_formula_is_better_than_the_second_but_of_second_order() -> None:
    """Its quadratic term has half the weight: the recorded numbers need it, a fine grid shows it."""
    target = GaussianTarget(FlowSchedule())
    fine = slopes(lambda steps: solve_error(target, steps, order=3), [160, 320])
    assert 1.9 < fine[0] < 2.2
    for steps in (20, 40):
        errors = [solve_error(target, steps, order=order) for order in (1, 2, 3)]
        assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("h", [1e-6, 1e-3, 0.009, 0.011, 0.3, 2.0, 30.0])
def test_phi_functions_are_the_integrals_they_stand_for(h: float) -> None:
    nodes, weights = np.polynomial.legendre.leggauss(64)
    u = (nodes + 1) / 2
    for power, value in ((0, -phi_1(h)), (1, phi_2(h)), (2, -2 * phi_3(h))):
        integral = float(np.sum(weights / 2 * h * np.exp(-h * (1 - u)) * u**power))
        assert value == pytest.approx(integral, rel=2e-9), power


@pytest.mark.parametrize("schedule", [FlowSchedule(), VPSchedule()], ids=["flow", "vp"])
def test_a_constant_prediction_is_solved_exactly_by_one_step(schedule: NoiseSchedule) -> None:
    times = torch.tensor([0.9, 0.2], dtype=torch.float64)
    noise, data = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    result = multistep(lambda latents, time: data, schedule, alpha[0] * data + sigma[0] * noise, times, order=3)
    torch.testing.assert_close(result, alpha[1] * data + sigma[1] * noise, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", [2, 3])
def test_fewer_steps_than_the_order_are_of_lower_order(order: int) -> None:
    target, times = GaussianTarget(FlowSchedule()), torch.tensor([0.999, 0.0])
    first = multistep(target.data, target.schedule, target.start, times, order=1)
    assert torch.equal(multistep(target.data, target.schedule, target.start, times, order=order), first)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("lower_order_final", [True, False])
def test_both_ends_of_the_flow_give_finite_right_answers(order: int, lower_order_final: bool) -> None:
    """At sigma 1 and 0 the log-SNR is infinite."""
    target = GaussianTarget(FlowSchedule())
    times = torch.linspace(1, 0, 101, dtype=torch.float64)
    result = multistep(
        target.data, target.schedule, target.start, times, order=order, lower_order_final=lower_order_final
    )
    assert torch.isfinite(result).all()
    assert target.error(result, times[-1]) < 0.05


def test_one_call_a_step_and_a_callback_that_can_replace_the_latents() -> None:
    calls: list[float] = []
    seen: list[tuple[int, float]] = []
    times = torch.tensor([0.9, 0.6, 0.3, 0.1])

    def predict(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        calls.append(float(time))
        return torch.zeros_like(latents)

    def callback(index: int, time: float, latents: torch.Tensor) -> torch.Tensor | None:
        seen.append((index, time))
        return torch.full_like(latents, 5.0) if index == 2 else None

    result = multistep(predict, FlowSchedule(), torch.ones(1, 2), times, callback=callback)
    assert calls == times[:-1].tolist()
    assert seen == list(enumerate(times[:-1].tolist()))
    assert result.tolist() == [[5.0, 5.0]]


@pytest.mark.parametrize(("options", "words"), [({"order": 4}, "1, 2 or 3"), ({"solver_type": "heun"}, "heun")])
def test_unknown_options_are_named(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        multistep(lambda latents, time: latents, FlowSchedule(), torch.ones(1), torch.tensor([0.9, 0.1]), **options)
