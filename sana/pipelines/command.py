"""How a command ends: one sentence on standard error and a documented exit code. No command's work is here."""

import sys
import traceback
from collections.abc import Callable

OK = 0
FAILURE = 1  # the work could not be done: weights, network, disk, a network that diverges
USAGE = 2  # what was asked for cannot be: an option, a prompt file, a config
INTERRUPTED = 130


def run_command(work: Callable[[], int | None], *, debug: bool = False) -> int:
    """Runs a command's work and turns errors that a user can act on into one sentence and an exit code.

    Errors nobody foresaw keep their traceback (and Python's exit code 1).

    Args:
        work: returns an exit code or None for success.
        debug: show the traceback of foreseen errors too.

    Returns:
        0 for success, 2 for wrong usage, 1 for failure, 130 after Ctrl-C.
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
        if debug:
            traceback.print_exc()
        sys.stderr.write(f"error: {one_sentence(error)}\n")
        return code


def exit_code(error: Exception) -> int | None:
    """Returns the exit code of a foreseen error, None for any other."""
    if isinstance(error, ValueError):
        return USAGE
    foreseen = ("CheckpointError", "FetchError", "TextEncoderError", "NonFiniteError", "DataError", "OutOfMemoryError")
    if isinstance(error, OSError | MemoryError) or any(kind.__name__ in foreseen for kind in type(error).__mro__):
        return FAILURE
    return None


def one_sentence(error: Exception) -> str:
    """Returns an error's message on one line; its class where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
