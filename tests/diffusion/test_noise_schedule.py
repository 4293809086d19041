"""Noise schedules: identities between their functions, the discrete process, and the grids."""

import math

import pytest
import torch

from sana.diffusion.noise_schedule import FlowSchedule, NoiseSchedule, VPSchedule, time_grid

SCHEDULES = pytest.mark.parametrize("schedule", [FlowSchedule(), VPSchedule()], ids=["flow", "vp"])
TIMES = torch.tensor([0.0015, 0.01, 0.3, 0.5, 0.9, 0.999], dtype=torch.float64)


@SCHEDULES
def test_log_snr_and_its_inverse(schedule: NoiseSchedule) -> None:
    """exp(-lambda), the inverse for another process, is what made the recorded singlestep results wrong."""
    lambdas = schedule.log_snr(TIMES)
    torch.testing.assert_close(lambdas, torch.log(schedule.alpha(TIMES) / schedule.sigma(TIMES)))
    assert bool((lambdas.diff() < 0).all())
    torch.testing.assert_close(schedule.inverse_log_snr(lambdas), TIMES, rtol=1e-9, atol=0)


def test_the_vp_process_preserves_variance_and_meets_the_discrete_one() -> None:
    schedule = VPSchedule()
    torch.testing.assert_close(schedule.alpha(TIMES) ** 2 + schedule.sigma(TIMES) ** 2, torch.ones_like(TIMES))
    betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    for step in (0, 1, 499, 999):
        cumulative = math.prod(1 - beta for beta in betas[: step + 1])
        time = torch.tensor((step + 1) / 1000, dtype=torch.float64)
        assert float(schedule.alpha(time)) == pytest.approx(math.sqrt(cumulative), rel=1e-9)


def test_infinite_ends_of_the_flow() -> None:
    ends = FlowSchedule().log_snr(torch.tensor([1.0, 0.0]))
    assert ends.tolist() == [-math.inf, math.inf]
    assert FlowSchedule().inverse_log_snr(ends).tolist() == [1.0, 0.0]


@SCHEDULES
@pytest.mark.parametrize("skip_type", ["time_uniform", "time_quadratic", "logSNR"])
def test_grids_run_from_first_to_last(schedule: NoiseSchedule, skip_type: str) -> None:
    grid = time_grid(skip_type, 12, schedule, first=0.9, last=0.01)
    assert grid.shape == (13,)
    assert grid[[0, -1]].tolist() == pytest.approx([0.9, 0.01], rel=1e-5)
    spaced = {"time_uniform": grid, "time_quadratic": grid.sqrt(), "logSNR": schedule.log_snr(grid)}[skip_type]
    torch.testing.assert_close(spaced.diff(), spaced.diff().mean().expand(12), rtol=1e-3, atol=0)


def test_an_unknown_grid_is_named() -> None:
    with pytest.raises(ValueError, match="'karras'.*time_uniform_flow"):
        time_grid("karras", 4, FlowSchedule())
