"""Runners of the recorded cases of the training kinds: samplers."""

from collections.abc import Callable

from tests.parity.common import Case

RUNNERS: dict[str, Callable[[Case], None]] = {}
FUNCTIONS: dict[str, Callable[[Case], None]] = {}
