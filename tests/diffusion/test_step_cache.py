"""Which steps are reused, what a reused step returns, and how far off an ODE with a known solution gets."""

import math

import pytest
import torch
from torch import Tensor

from sana.diffusion import flow_dpm_solver, flow_euler
from sana.diffusion.noise_schedule import FlowSchedule
from sana.diffusion.step_cache import StepCache, plan_steps, relative_changes
from tests.diffusion.gaussian import GaussianTarget

SAMPLERS = {"flow_euler": flow_euler, "flow_dpm-solver": flow_dpm_solver}


def smooth_features(times: Tensor) -> Tensor:
    """Smooth features of the times, as a trained embedding has them: (N, 16)."""
    angles = times[:-1, None].double() * torch.linspace(0.5, 4, 8)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def test_relative_changes_by_hand() -> None:
    features = torch.tensor([[1.0, -3.0], [2.0, -3.0], [2.0, 1.0]])
    assert relative_changes(features) == pytest.approx([0, 1 / 4, 4 / 5])


def test_rows_of_zeros_are_no_division_by_zero() -> None:
    assert relative_changes(torch.zeros(3, 2)) == [0, 0, 0]


def test_plan_by_hand() -> None:
    features = torch.tensor([1.0, 1.1, 1.21, 1.331, 1.4641, 1.61051, 1.771561], dtype=torch.float64)[:, None]
    # Every step changes the feature by 0.1: a threshold of 0.25 reuses two steps and evaluates the third.
    assert plan_steps(features, 0.25) == (True, False, False, True, False, False, True)
    assert plan_steps(features, 0.15) == (True, False, True, False, True, False, True)
    assert plan_steps(features, 0.05) == (True,) * 7
    assert plan_steps(features, 9.0) == (True, *(False,) * 5, True)


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_first_and_last_steps_are_evaluated(steps: int) -> None:
    plan = plan_steps(torch.zeros(steps, 4), 1e6)  # nothing changes at all
    assert plan[0] and plan[-1]
    assert not any(plan[1:-1])


def test_threshold_zero_evaluates_every_step_even_where_nothing_changes() -> None:
    assert plan_steps(torch.zeros(5, 4), 0.0) == (True,) * 5


def test_a_higher_threshold_never_evaluates_more_steps() -> None:
    features = smooth_features(flow_dpm_solver.times(20, flow_shift=4.0))
    counts = [sum(plan_steps(features, threshold)) for threshold in (0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 20 and counts[-1] == 2


def test_other_branches_are_never_served_by_an_old_prediction() -> None:
    groups = ["both", "both", "one", "one", "one", "both", "both"]
    assert plan_steps(torch.zeros(7, 1), 1.0, groups=groups) == (True, False, True, False, False, True, True)


@pytest.mark.parametrize("threshold", [-0.1, math.nan, math.inf])
def test_impossible_thresholds(threshold: float) -> None:
    with pytest.raises(ValueError, match="finite number from 0 up"):
        plan_steps(torch.zeros(3, 1), threshold)


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="2 groups were given for 3 steps"):
        plan_steps(torch.zeros(3, 1), 0.1, groups=[1, 1])
    with pytest.raises(ValueError, match="plan has 2 steps and the sampler 3"):
        StepCache(lambda latents, sigma: latents, torch.tensor([1.0, 0.6, 0.3, 0.0]), (True, False))


def test_a_reused_step_returns_the_last_evaluated_prediction() -> None:
    times = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    cache = StepCache(lambda latents, sigma: latents * sigma, times, (True, False, True, True))
    latents = torch.ones(2)
    outputs = [float(cache(latents, time)[0]) for time in times[:-1]]
    assert outputs == [1.0, 1.0, 0.5, 0.25]
    assert (cache.evaluated, cache.reused) == (3, 1)
    assert float(cache(latents, torch.tensor(0.9))[0]) == pytest.approx(0.9)  # a time that no plan knows
    assert cache.evaluated == 4


def test_without_a_prediction_every_step_is_evaluated() -> None:
    cache = StepCache(lambda latents, sigma: latents * sigma, torch.tensor([1.0, 0.5, 0.0]), (True, False))
    assert float(cache(torch.ones(1), torch.tensor(0.5))) == 0.5
    assert (cache.evaluated, cache.reused) == (1, 0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_threshold_zero_is_exact(name: str) -> None:
    sampler, target = SAMPLERS[name], GaussianTarget(FlowSchedule())
    times = sampler.times(20, flow_shift=3.0)
    cache = StepCache(target.velocity, times, plan_steps(smooth_features(times), 0.0))
    assert torch.equal(sampler.sample(cache, target.start, times), sampler.sample(target.velocity, target.start, times))
    assert (cache.evaluated, cache.reused) == (20, 0)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.6])
def test_the_error_of_reused_steps_is_bounded(name: str, threshold: float) -> None:
    """A reused velocity is off by at most its change since it was made, times the length of the steps it serves."""
    sampler, target = SAMPLERS[name], GaussianTarget(FlowSchedule())
    times = torch.linspace(0.95, 0.05, 61, dtype=torch.float64)
    plan = plan_steps(smooth_features(times), threshold)
    cache = StepCache(target.velocity, times, plan)
    start = target.state(times[0])
    exact = sampler.sample(target.velocity, start, times)
    error = (sampler.sample(cache, start, times) - exact).abs().max()
    velocities = [target.velocity(target.state(time), time) for time in times[:-1]]
    bound, last = 0.0, 0
    for index, evaluated in enumerate(plan):
        last = index if evaluated else last
        change = float((velocities[index] - velocities[last]).abs().max())
        bound += change * float(times[index] - times[index + 1])
    assert cache.reused == plan.count(False) > 0
    # The later flow moves an error by at most the ratio of the spreads; the slope terms of order 2 double it.
    growth = float((target.spread(times[-1]) / target.spread(times[0])).max().clamp_min(1))
    assert 0 < error <= 2 * growth * bound


def test_the_error_vanishes_with_the_threshold() -> None:
    target = GaussianTarget(FlowSchedule())
    times = torch.linspace(0.95, 0.05, 201, dtype=torch.float64)
    exact = flow_euler.sample(target.velocity, target.state(times[0]), times)
    errors = []
    for threshold in (0.8, 0.2, 0.05):
        cache = StepCache(target.velocity, times, plan_steps(smooth_features(times), threshold))
        errors.append(float((flow_euler.sample(cache, target.state(times[0]), times) - exact).abs().max()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
