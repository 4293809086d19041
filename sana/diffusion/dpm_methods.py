"""The one choice between multistep, singlestep and adaptive DPM-Solver++. No schedule and no model is here."""

from dataclasses import dataclass

from torch import Tensor

from sana.diffusion.dpm_multistep import check_solver, multistep
from sana.diffusion.dpm_singlestep import adaptive, singlestep, singlestep_orders, singlestep_times
from sana.diffusion.noise_schedule import NoiseSchedule, time_grid
from sana.diffusion.sampler import ModelFn, StepCallback, check_steps

METHODS = ("multistep", "singlestep", "adaptive")


@dataclass(frozen=True)
class DPMOptions:
    """How DPM-Solver++ walks a list of times.

    Attributes:
        order: 1, 2 or 3; with fewer steps than the order the order is lower.
        method: "multistep" makes one model call a step and remembers earlier ones; "singlestep" makes up to `order`
            calls a step; "adaptive" goes from the first to the last time in steps of its own.
        solver_type: "dpmsolver", "taylor" or "adams": how the terms beyond the first are weighted; see `multistep`.
        lower_order_final: only for "multistep": whether the last steps lower the order.

    Raises:
        ValueError: an option is unknown.
    """

    order: int = 2
    method: str = "multistep"
    solver_type: str = "dpmsolver"
    lower_order_final: bool = True

    def __post_init__(self) -> None:
        check_solver(self.order, self.solver_type)
        if self.method not in METHODS:
            raise ValueError(f"Unknown solver method {self.method!r}; known: {', '.join(METHODS)}.")


def make_times(
    num_inference_steps: int,
    schedule: NoiseSchedule,
    *,
    skip_type: str,
    flow_shift: float = 1.0,
    first: float = 1.0,
    last: float = 0.001,
    method: str = "multistep",
    order: int = 2,
) -> Tensor:
    """Returns the times of `num_inference_steps` model calls, and the end: (N + 1,) float32. See `time_grid`.

    `method` and `order` matter for "singlestep" on "logSNR" only, whose steps are equal in lambda.
    """
    check_steps(num_inference_steps)
    if method == "singlestep":
        orders = singlestep_orders(num_inference_steps, order)
        return singlestep_times(skip_type, orders, schedule, first=first, last=last, flow_shift=flow_shift)
    return time_grid(skip_type, num_inference_steps, schedule, first=first, last=last, flow_shift=flow_shift)


def solve(
    predict_data: ModelFn,
    schedule: NoiseSchedule,
    noise: Tensor,
    times: Tensor,
    options: DPMOptions,
    callback: StepCallback | None,
) -> Tensor:
    """Integrates from times[0] to times[-1] by the method of the options; see the methods themselves."""
    solver_type = options.solver_type
    if options.method == "singlestep":
        orders = singlestep_orders(len(times) - 1, options.order)
        return singlestep(predict_data, schedule, noise, times, orders, solver_type=solver_type, callback=callback)
    if options.method == "adaptive":
        first, last = float(times[0]), float(times[-1])
        return adaptive(
            predict_data,
            schedule,
            noise,
            first,
            last,
            order=options.order,
            solver_type=solver_type,
            callback=callback,
        )
    return multistep(
        predict_data,
        schedule,
        noise,
        times,
        order=options.order,
        lower_order_final=options.lower_order_final,
        solver_type=solver_type,
        callback=callback,
    )
