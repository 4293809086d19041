"""Singlestep and adaptive DPM-Solver++ against the exact solution for a Gaussian target."""

import pytest
import torch

from sana.diffusion.dpm_singlestep import adaptive, singlestep, singlestep_orders, singlestep_times
from sana.diffusion.noise_schedule import FlowSchedule, NoiseSchedule, VPSchedule
from tests.diffusion.gaussian import GaussianTarget, slopes

SCHEDULES = pytest.mark.parametrize("schedule", [FlowSchedule(), VPSchedule()], ids=["flow", "vp"])


@SCHEDULES
@pytest.mark.parametrize("solver_type", ["dpmsolver", "taylor"])
@pytest.mark.parametrize(("order", "least"), [(1, 0.9), (2, 1.8), (3, 2.6)])
def test_order_of_convergence(schedule: NoiseSchedule, solver_type: str, order: int, least: float) -> None:
    target = GaussianTarget(schedule)

    def error_of(calls: int) -> float:
        times = target.lambda_grid(-3, 3, calls)
        orders = [order] * (calls // order)
        result = singlestep(target.data, schedule, target.state(times[0]), times, orders, solver_type=solver_type)
        return target.error(result, times[-1])

    assert min(slopes(error_of, [48, 96, 192])) >= least


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("calls", range(1, 14))
def test_orders_use_exactly_the_calls_they_are_given(calls: int, order: int) -> None:
    orders = singlestep_orders(calls, order)
    assert sum(orders) == calls
    assert max(orders) <= order
    if calls % 3 == 0 and order == 3 and calls > 3:
        assert orders[-2:] == [2, 1]  # the last steps are of lower order, as published


def test_log_snr_steps_are_equal_whatever_their_order() -> None:
    schedule = VPSchedule()
    times = singlestep_times("logSNR", [3, 3, 2, 1], schedule, first=1.0, last=0.001, flow_shift=1.0)
    lambdas = schedule.log_snr(times)
    outer = lambdas[[0, 3, 6, 8, 9]].diff()
    torch.testing.assert_close(outer, outer.mean().expand(4), rtol=1e-4, atol=0)
    torch.testing.assert_close(lambdas[:4].diff(), lambdas[:4].diff().mean().expand(3), rtol=1e-4, atol=0)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_flow_is_solved_to_its_infinite_ends(order: int) -> None:
    target, times = GaussianTarget(FlowSchedule()), torch.linspace(1, 0, 121, dtype=torch.float64)
    orders = singlestep_orders(120, order)
    result = singlestep(target.data, target.schedule, target.start, times, orders)
    assert target.error(result, times[-1]) < 0.05


@SCHEDULES
@pytest.mark.parametrize("order", [2, 3])
def test_adaptive_steps_keep_the_error_small(schedule: NoiseSchedule, order: int) -> None:
    target = GaussianTarget(schedule)
    first, last = torch.tensor([0.99, 0.01], dtype=torch.float64)
    seen: list[float] = []
    result = adaptive(
        target.data,
        schedule,
        target.state(first),
        float(first),
        float(last),
        order=order,
        callback=lambda index, time, latents: seen.append(time),
    )
    assert target.error(result, last) < 0.2
    assert 3 < len(seen) < 200
    assert seen == sorted(seen, reverse=True)
    strict = {"order": order, "atol": 1e-4, "rtol": 1e-4}
    result = adaptive(target.data, schedule, target.state(first), float(first), float(last), **strict)
    assert target.error(result, last) < 5e-3


def test_adaptive_stops_with_a_sentence() -> None:
    target = GaussianTarget(FlowSchedule())
    with pytest.raises(ValueError, match="finite log-SNR"):
        adaptive(target.data, target.schedule, target.start, 1.0, 0.0)
    with pytest.raises(ValueError, match="2 or 3"):
        adaptive(target.data, target.schedule, target.start, 0.9, 0.1, order=1)
    with pytest.raises(RuntimeError, match="5 steps"):
        adaptive(
            target.data, target.schedule, target.state(torch.tensor(0.9)), 0.9, 0.1, atol=1e-9, rtol=0, max_tries=5
        )


def test_the_number_of_times_must_fit_the_orders() -> None:
    with pytest.raises(ValueError, match="need 4 times, not 3"):
        singlestep(lambda x, t: x, FlowSchedule(), torch.ones(1), torch.tensor([0.9, 0.5, 0.1]), [2, 1])
