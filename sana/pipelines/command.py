"""How a command ends: one sentence on standard error and a documented exit code. No command's work is here."""

import sys
import time
import traceback
from collections.abc import Callable

from sana.utils.distributed import rank

OK = 0
FAILURE = 1  # the work could not be done: weights, network, disk, a network that diverges
USAGE = 2  # what was asked for cannot be: an option, a prompt file, a config
DOES_NOT_FIT = 3  # nothing that may be chosen fits into the memory that is allowed
INTERRUPTED = 130
PATIENCE_SECONDS = 8.0  # a process needs some to end, on a busy machine
FORESEEN = (  # by name: importing their homes takes seconds
    "CheckpointError", "CheckpointWriteError", "DataError", "FetchError", "NonFiniteError", "OutOfMemoryError",
    "TextEncoderError", "TrackerError", "TrainingDivergedError",
)  # fmt: skip


def run_command(work: Callable[[], int | None], *, debug: bool = False) -> int:
    """Runs a command's work and turns errors that a user can act on into one sentence and an exit code.

    Errors nobody foresaw keep their traceback (and Python's exit code 1). Of several processes that fail alike only the
    main one is heard: the others wait a moment, in which torchrun ends them; one that fails alone then speaks.

    Args:
        work: returns an exit code or None for success.
        debug: show the traceback of foreseen errors too.

    Returns:
        0 for success, 2 for wrong usage, 1 for failure, 3 where memory does not suffice by plan, 130 after Ctrl-C.
    """
    try:
        return work() or OK
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to go on\n")
        return INTERRUPTED
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        if rank():
            time.sleep(PATIENCE_SECONDS)
        if debug:
            traceback.print_exc()
        sys.stderr.write(f"error: {one_sentence(error)}\n")
        return code


def exit_code(error: Exception) -> int | None:
    """Returns the exit code of a foreseen error, None for any other."""
    if isinstance(error, ValueError):
        return USAGE
    if type(error).__name__ == "MemoryLimitError":  # by name, as those below
        return DOES_NOT_FIT
    if isinstance(error, OSError | MemoryError) or any(kind.__name__ in FORESEEN for kind in type(error).__mro__):
        return FAILURE
    return None


def one_sentence(error: Exception) -> str:
    """Returns an error's message on one line; its class where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
