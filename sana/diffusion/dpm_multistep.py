"""Multistep DPM-Solver++ of orders 1 to 3 on any noise schedule (Lu et al. 2022, 2211.01095). No model is here."""

import math
from collections.abc import Sequence

from torch import Tensor

from sana.diffusion.noise_schedule import NoiseSchedule
from sana.diffusion.sampler import ModelFn, StepCallback, report

SOLVER_TYPES = ("dpmsolver", "taylor", "adams")


def check_solver(order: int, solver_type: str) -> None:
    """Raises ValueError unless the order is 1, 2 or 3 and the solver type is known."""
    if order not in (1, 2, 3):
        raise ValueError(f"The solver's order must be 1, 2 or 3, not {order!r}.")
    if solver_type not in SOLVER_TYPES:
        raise ValueError(f"Unknown solver type {solver_type!r}; known: {', '.join(SOLVER_TYPES)}.")


def multistep(
    predict_data: ModelFn,
    schedule: NoiseSchedule,
    latents: Tensor,
    times: Tensor,
    *,
    order: int = 2,
    solver_type: str = "dpmsolver",
    lower_order_final: bool = True,
    callback: StepCallback | None = None,
) -> Tensor:
    """Integrates from times[0] to times[-1] with one model call a step.

    A step has the lowest of: `order`, the number of predictions so far, and (with `lower_order_final`) the number of
    steps left. A step to or from a time with infinite log-SNR is of order 1, where the exact update stays finite; so
    fewer steps than the order asks for are simply of lower order.

    Args:
        predict_data: (latents, time) -> predicted clean latents.
        schedule: alpha, sigma and lambda of the times.
        latents: (B, ...) at times[0].
        times: (N + 1,) falling.
        order: 1, 2 or 3.
        solver_type: how the terms beyond the first are weighted. "dpmsolver" and "taylor" differ at order 2 and are the
            released formulas; at order 3 both give the quadratic term half its weight, so that their error falls only
            as h^2 when h is small. "adams" integrates the polynomial exactly ("taylor" up to order 2).
        lower_order_final: whether the last steps lower the order, which keeps few steps stable.
        callback: see `Sampler`.
    """
    check_solver(order, solver_type)
    steps = len(times) - 1
    lambdas = schedule.log_snr(times).tolist()
    alphas, sigmas = schedule.alpha(times).tolist(), schedule.sigma(times).tolist()
    history: list[tuple[float, Tensor]] = []  # (lambda, predicted data), the newest first
    for i in range(steps):
        history = [(lambdas[i], predict_data(latents, times[i])), *history[: order - 1]]
        step_order = min(order, len(history), steps - i if lower_order_final else order)
        h = lambdas[i + 1] - lambdas[i]
        if math.isinf(h):
            step_order = 1
        data = _extrapolate(history[:step_order], h, solver_type)
        latents = (sigmas[i + 1] / sigmas[i]) * latents + alphas[i + 1] * data
        latents = report(callback, i, times[i], latents)
    return latents


def phi_1(h: float) -> float:
    """exp(-h) - 1; -1 for an infinite step."""
    return math.expm1(-h)


def phi_2(h: float) -> float:
    """phi_1 / h + 1."""
    return phi_1(h) / h + 1 if abs(h) > 1e-4 else h / 2 - h * h / 6


def phi_3(h: float) -> float:
    """phi_2 / h - 1/2."""
    return phi_2(h) / h - 0.5 if abs(h) > 1e-2 else -h / 6 + h**2 / 24 - h**3 / 120 + h**4 / 720


def _extrapolate(history: Sequence[tuple[float, Tensor]], h: float, solver_type: str) -> Tensor:
    """Returns the integral of exp(lambda - lambda_end) * data over the next step, of length h in lambda.

    The predictions are extended by a polynomial through the newest len(history) of them.
    """
    lambda_0, newest = history[0]
    data = -phi_1(h) * newest
    if len(history) == 1:
        return data
    lambda_1, older = history[1]
    r0 = (lambda_0 - lambda_1) / h
    slope_0 = (newest - older) / r0
    if len(history) == 2:
        return data + (-0.5 * phi_1(h) if solver_type == "dpmsolver" else phi_2(h)) * slope_0
    lambda_2, oldest = history[2]
    r1 = (lambda_1 - lambda_2) / h
    curvature = (slope_0 - (older - oldest) / r1) / (r0 + r1)
    quadratic = -2 * phi_3(h) if solver_type == "adams" else -phi_3(h)
    return data + phi_2(h) * (slope_0 + r0 * curvature) + quadratic * curvature
