"""Singlestep and adaptive DPM-Solver++ on any noise schedule (Lu et al. 2022, arXiv 2206.00927). No model is here."""

import math

import torch
from torch import Tensor

from sana.diffusion.dpm_multistep import check_solver, phi_1, phi_2, phi_3
from sana.diffusion.noise_schedule import NoiseSchedule, time_grid
from sana.diffusion.sampler import ModelFn, StepCallback, report


def singlestep_orders(num_calls: int, order: int) -> list[int]:
    """Returns the orders of steps that together make `num_calls` model calls; only the last are below `order`."""
    if order == 3 and num_calls % 3 == 0:
        return [3] * (num_calls // 3 - 1) + [2, 1]
    whole, rest = divmod(num_calls, order)
    return [order] * whole + [rest] * (rest > 0)


def singlestep_times(
    skip_type: str, orders: list[int], schedule: NoiseSchedule, *, first: float, last: float, flow_shift: float
) -> Tensor:
    """Returns the times of every model call of steps of the given orders, and the end: (sum(orders) + 1,) float32.

    For "logSNR" the steps are equal in lambda whatever their order, and so are the parts of a step; other grids are
    uniform over the model calls.
    """
    total = sum(orders)
    if skip_type != "logSNR":
        return time_grid(skip_type, total, schedule, first=first, last=last, flow_shift=flow_shift)
    outer = time_grid(skip_type, len(orders), schedule, first=first, last=last).double()
    ends = schedule.log_snr(outer)
    parts = [
        torch.linspace(float(ends[i]), float(ends[i + 1]), k + 1, dtype=torch.float64)[:-1]
        for i, k in enumerate(orders)
    ]
    return schedule.inverse_log_snr(torch.cat([*parts, ends[-1:]])).float()


def singlestep(
    predict_data: ModelFn,
    schedule: NoiseSchedule,
    latents: Tensor,
    times: Tensor,
    orders: list[int],
    *,
    solver_type: str = "dpmsolver",
    callback: StepCallback | None = None,
) -> Tensor:
    """Integrates with steps that make `order` model calls each and keep nothing of the step before.

    A step of order k spans k intervals of `times`, whose inner times are where it calls the model. Where the log-SNR at
    an end is infinite, its intervals are walked by steps of order 1.

    Args:
        predict_data: (latents, time) -> predicted clean latents.
        schedule: alpha, sigma and lambda of the times.
        latents: (B, ...) at times[0].
        times: (sum(orders) + 1,) falling.
        orders: of the steps, each 1, 2 or 3.
        solver_type: "dpmsolver", or "taylor", which is also "adams" here.
        callback: see `Sampler`; called after every step.
    """
    check_solver(max(orders), solver_type)
    if sum(orders) + 1 != len(times):
        raise ValueError(f"Steps of orders {orders} need {sum(orders) + 1} times, not {len(times)}.")
    start, index = 0, 0
    for order in orders:
        span = times[start : start + order + 1]
        finite = bool(torch.isfinite(schedule.log_snr(span)).all())
        for part in [span] if finite else [span[i : i + 2] for i in range(order)]:
            latents, _ = single_step(predict_data, schedule, latents, part, solver_type)
            latents = report(callback, index, part[0], latents)
            index += 1
        start += order
    return latents


def single_step(
    predict_data: ModelFn, schedule: NoiseSchedule, latents: Tensor, times: Tensor, solver_type: str = "dpmsolver"
) -> tuple[Tensor, Tensor]:
    """One step of order len(times) - 1.

    Returns:
        The latents at times[-1], and those of the step one order lower (at order 1 the same).
    """
    lambdas = schedule.log_snr(times).tolist()
    alphas, sigmas = schedule.alpha(times).tolist(), schedule.sigma(times).tolist()
    h = lambdas[-1] - lambdas[0]
    order = len(times) - 1
    data_0 = predict_data(latents, times[0])

    def move(end: int, data: Tensor) -> Tensor:
        return (sigmas[end] / sigmas[0]) * latents + alphas[end] * data

    def first_order(end: int) -> Tensor:
        return -phi_1(lambdas[end] - lambdas[0]) * data_0

    if order == 1:
        result = move(1, first_order(1))
        return result, result
    weight_2 = -0.5 * phi_1(h) if solver_type == "dpmsolver" else phi_2(h)
    r1 = (lambdas[1] - lambdas[0]) / h
    slope_1 = (predict_data(move(1, first_order(1)), times[1]) - data_0) / r1
    if order == 2:
        return move(2, first_order(2) + weight_2 * slope_1), move(2, first_order(2))
    r2 = (lambdas[2] - lambdas[0]) / h
    inner = first_order(2) + r2 * phi_2(r2 * h) * slope_1
    slope_2 = (predict_data(move(2, inner), times[2]) - data_0) / r2
    lower = move(3, first_order(3) + weight_2 * slope_1)
    if solver_type == "dpmsolver":
        return move(3, first_order(3) + phi_2(h) * slope_2), lower
    slope = (r2 * slope_1 - r1 * slope_2) / (r2 - r1)
    curvature = 2 * (slope_2 - slope_1) / (r2 - r1)
    return move(3, first_order(3) + phi_2(h) * slope - phi_3(h) * curvature), lower


def adaptive(
    predict_data: ModelFn,
    schedule: NoiseSchedule,
    latents: Tensor,
    first: float,
    last: float,
    *,
    order: int = 2,
    solver_type: str = "dpmsolver",
    first_step: float = 0.05,
    atol: float = 0.0078,
    rtol: float = 0.05,
    safety: float = 0.9,
    max_tries: int = 10_000,
    callback: StepCallback | None = None,
) -> Tensor:
    """Integrates with steps whose length follows the difference between orders k - 1 and k.

    The whole batch shares one step length, so an image may depend on its companions; no other method here does that.

    Args:
        predict_data: (latents, time) -> predicted clean latents.
        schedule: alpha, sigma, lambda and its inverse.
        latents: (B, ...) at time `first`.
        first: start; its log-SNR must be finite.
        last: end; its log-SNR must be finite.
        order: 2 or 3.
        solver_type: "dpmsolver" or "taylor".
        first_step: length in lambda of the first trial step.
        atol: error allowed absolutely.
        rtol: error allowed relative to the latents.
        safety: factor on the step length, below 1.
        max_tries: bound on the steps tried.
        callback: see `Sampler`; called after every accepted step.

    Raises:
        ValueError: the order, or an end with infinite log-SNR.
        RuntimeError: more than `max_tries` steps were tried.
    """
    if order not in (2, 3):
        raise ValueError(f"The adaptive solver's order must be 2 or 3, not {order!r}.")
    here, end = (float(schedule.log_snr(torch.tensor(t, dtype=torch.float64))) for t in (first, last))
    if not (math.isfinite(here) and math.isfinite(end)):
        raise ValueError(
            f"The adaptive solver needs ends with a finite log-SNR; times {first}, {last} have {here}, {end}."
        )
    h, previous, accepted = first_step, latents, 0
    for _ in range(max_tries):
        lambdas = torch.linspace(here, here + h, order + 1, dtype=torch.float64)
        times = schedule.inverse_log_snr(lambdas).float()
        higher, lower = single_step(predict_data, schedule, latents, times, solver_type)
        allowed = torch.maximum(torch.full_like(lower, atol), rtol * torch.maximum(lower.abs(), previous.abs()))
        error = float(((higher - lower) / allowed).flatten(1).square().mean(1).sqrt().max())
        if error <= 1:
            latents, previous = report(callback, accepted, times[0], higher), lower
            here, accepted = here + h, accepted + 1
            if end - here < 1e-6:
                return latents
        h = min(safety * h * max(error, 1e-10) ** (-1 / order), end - here)
    raise RuntimeError(f"The adaptive solver did not reach time {last} in {max_tries} steps; raise atol or rtol.")
