"""What every sampler is: a function that makes a list of times, and a function that walks it. No formula is here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None
StepCallback = Callable[[int, float, Tensor], Tensor | None]
ModelFn = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sampler:
    """One entry of `sana.diffusion.SAMPLERS`.

    Attributes:
        times: (num_inference_steps, **options) -> (N + 1,) times on the CPU; the last is where the result lives.
        sample: (model, noise, times, *, generator=None, callback=None, **options) -> latents like `noise`.
            `model(latents, time)` takes a 0-d CPU time in [0, 1] which, times 1000, is the network's timestep (for
            "trigflow" an angle, used as it is). `callback(index, time, latents)` runs after each step with the time at
            which the step began; a tensor that it returns replaces the latents.
        prediction: what `model` returns: "velocity", "noise" or "trigflow".
    """

    times: Callable[..., Tensor]
    sample: Callable[..., Tensor]
    prediction: str


def report(callback: StepCallback | None, index: int, time: Tensor, latents: Tensor) -> Tensor:
    """Calls the callback, if any, and returns the latents to go on with."""
    changed = callback(index, float(time), latents) if callback is not None else None
    return latents if changed is None else changed


def check_steps(num_inference_steps: int) -> None:
    """Raises ValueError unless the number of steps is a positive integer."""
    if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be a positive integer, not {num_inference_steps!r}.")
