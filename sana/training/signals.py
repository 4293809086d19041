"""Stopping a run politely: SIGTERM and SIGINT are noted, and the training loop stops after the current step."""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Self

HANDLED = (signal.SIGTERM, signal.SIGINT)
REPEAT_SECONDS = 1.0


class StoppedBySignal(Exception):  # noqa: N818  no error: the run was asked to stop, and its state is saved
    """Raised by the trainer after the checkpoint is written.

    Attributes:
        exit_code: 143 for SIGTERM, 130 for SIGINT, as shells have it.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; the same command goes on from here")
        self.exit_code = 128 + signum


class SignalWatch:
    """Notes the first signal; a later one acts as ever (a second Ctrl-C interrupts at once).

    One that follows within `REPEAT_SECONDS` is taken for the same: torchrun passes on to its processes what the
    terminal or the scheduler has sent to all of them already.

    Args:
        launched: the parent is a launcher, without which the run must not go on.
        clock: seconds, from any beginning.

    Attributes:
        received: the signal, 0 for none.
    """

    def __init__(self, *, launched: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.received = 0
        self._parent = os.getppid() if launched else None
        self._clock, self._first = clock, 0.0
        self._previous: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        for signum in HANDLED:
            self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    @property
    def asked(self) -> int:
        """The signal; SIGTERM if the launcher was killed: its processes must not train on beside those of the next."""
        orphaned = self._parent is not None and os.getppid() != self._parent
        return self.received or (signal.SIGTERM if orphaned else 0)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._first = signum, self._clock()
        elif self._clock() - self._first >= REPEAT_SECONDS:
            signal.signal(signum, self._previous[signum])
            signal.raise_signal(signum)
