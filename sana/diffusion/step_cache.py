"""Step caching: some steps of a sampler reuse the prediction of an earlier one. No model and no solver is here.

After TeaCache (Liu et al. 2024, 2411.19108): a step is left out while the relative L1 changes of a cheap feature, added
up since the last evaluated step, stay below a threshold. TeaCache compares the first block's modulated input, which
depends on the picture, and corrects it by a polynomial fitted for each model. Here the feature depends on the time
alone (the embedding that modulates that input) and nothing is fitted, so all is decided before the first step: a
picture never depends on its batch, nothing waits for the device, and a whole loop can be captured in one graph.
"""

import math
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

VelocityFn = Callable[[Tensor, Tensor], Tensor]


def relative_changes(features: Tensor) -> list[float]:
    """Returns |f_i - f_(i-1)|_1 / |f_(i-1)|_1 of consecutive rows, with 0 for the first.

    Args:
        features: (N, F), one row a step.
    """
    rows = features.detach().to(device="cpu", dtype=torch.float64)
    steps = (rows[1:] - rows[:-1]).abs().sum(1)
    return [0.0, *(steps / rows[:-1].abs().sum(1).clamp_min(torch.finfo(torch.float64).tiny)).tolist()]


def plan_steps(features: Tensor, threshold: float, *, groups: Sequence[Hashable] | None = None) -> tuple[bool, ...]:
    """Decides which steps evaluate the model; the others reuse the last evaluated step's prediction.

    The first and the last step are always evaluated.

    Args:
        features: (N, F), what the model knows of each step's time.
        threshold: a step is reused while the changes since the last evaluated step add up to less; 0 reuses none.
        groups: one value a step; a prediction is never reused where the value changes (guidance begins or ends).

    Returns:
        N booleans, True for a step that evaluates the model.

    Raises:
        ValueError: the threshold is negative or not finite, or `groups` has another length.
    """
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"The threshold of the step cache must be a finite number from 0 up, not {threshold!r}.")
    changes = relative_changes(features)
    kinds = [None] * len(changes) if groups is None else list(groups)
    if len(kinds) != len(changes):
        raise ValueError(f"{len(kinds)} groups were given for {len(changes)} steps; give one for each.")
    evaluate, collected, last = [], 0.0, len(changes) - 1
    for index, change in enumerate(changes):
        collected += change
        same = index > 0 and kinds[index] == kinds[index - 1]
        reused = 0 < index < last and same and collected < threshold
        evaluate.append(not reused)
        collected = collected if reused else 0.0
    return tuple(evaluate)


class StepCache:
    """A velocity function that evaluates another one at some times only, and else returns the last result again.

    Make one for each run of a sampler: it remembers a prediction. The steps that are reused are told by their time, so
    any sampler may be used; a time outside the plan is evaluated. On the flow process Euler's step is DPM-Solver's step
    of order 1, so to go on with an old velocity is to go on with the old predicted latents as well.

    Args:
        velocity: (latents, sigma 0-d) -> velocity (or noise) like `latents`.
        times: (N + 1,) the sampler's times.
        evaluate: N booleans from `plan_steps`.

    Attributes:
        evaluated: number of calls that reached `velocity`.
        reused: number of calls that did not.

    Raises:
        ValueError: there is not one boolean for each step.
    """

    def __init__(self, velocity: VelocityFn, times: Tensor, evaluate: Sequence[bool]) -> None:
        if len(evaluate) != len(times) - 1:
            raise ValueError(f"The plan has {len(evaluate)} steps and the sampler {len(times) - 1}.")
        self.evaluated = 0
        self.reused = 0
        self._velocity = velocity
        self._times_to_reuse = {float(time) for time, run in zip(times[:-1], evaluate, strict=True) if not run}
        self._last: Tensor | None = None

    def __call__(self, latents: Tensor, sigma: Tensor) -> Tensor:
        """(B, ...), 0-d -> (B, ...). A reused result is the same tensor again and must not be written to."""
        if self._last is not None and float(sigma) in self._times_to_reuse:
            self.reused += 1
            return self._last
        self.evaluated += 1
        self._last = self._velocity(latents, sigma)
        return self._last
