"""How fast pictures leave, and so when there will be room for another. Clocks are given, nothing is measured here."""

import math

FIRST_GUESS = 10.0  # seconds a client is asked to wait before anything was measured
LONGEST_WAIT = 3600.0
KEPT = 0.9  # of what was known before, at every picture: about the last ten count


class Throughput:
    """A running average of work done a second, while there is work.

    Work has any unit that is about proportional to time; the engine takes pixels times rows evaluated.
    """

    def __init__(self) -> None:
        self._work = self._seconds = 0.0
        self._since: float | None = None

    @property
    def rate(self) -> float | None:
        """Work a second; None before the first picture."""
        return self._work / self._seconds if self._seconds > 0 else None

    def busy(self, now: float) -> None:
        """Says that work has begun, or goes on."""
        if self._since is None:
            self._since = now

    def idle(self) -> None:
        """Says that there is no work: the time until `busy` does not count."""
        self._since = None

    def done(self, work: float, now: float) -> None:
        """Says that a picture is finished, after `busy`."""
        if self._since is None:
            return
        self._work = KEPT * self._work + work
        self._seconds = KEPT * self._seconds + (now - self._since)
        self._since = now

    def wait(self, work: float) -> int:
        """Returns whole seconds, at least 1, until so much work will be done."""
        seconds = work / self.rate if self.rate else FIRST_GUESS
        return max(1, math.ceil(min(seconds, LONGEST_WAIT)))
