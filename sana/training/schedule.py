"""Learning-rate schedule by progress: linear warm-up, then cosine to zero, bounded by steps and by minutes."""

import math
import time


class Progress:
    """How far a run is, in [0, 1]: the larger of steps done and (optional) minutes spent.

    Args:
        total_steps: steps of the whole run.
        minutes: wall-clock budget of the whole run; None for no limit.
        step: steps done before (resume).
        seconds: seconds spent before (resume).
    """

    def __init__(self, total_steps: int, minutes: float | None = None, *, step: int = 0, seconds: float = 0.0) -> None:
        self.total_steps, self.minutes, self.step = total_steps, minutes, step
        self.start = time.monotonic() - seconds

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    @property
    def fraction(self) -> float:
        by_time = self.seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(self.step / self.total_steps, by_time))


def lr_factor(step: int, fraction: float, *, warmup_steps: int = 100) -> float:
    """Factor in [0, 1] on the peak learning rate."""
    return min(1.0, (step + 1) / warmup_steps) * 0.5 * (1 + math.cos(math.pi * fraction))
