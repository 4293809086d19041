"""`sana serve` that tells, when asked, what its process holds: for finding leaks. Who asks is in `serving_memory.py`.

Takes the arguments of `sana serve`. Every line on standard input is answered by a line of JSON on standard output,
after the server's own first line. The server itself is not changed by it: a thread waits for the questions.
"""

import asyncio
import ctypes
import gc
import json
import sys
import threading
from collections.abc import Sequence
from typing import Any

from sana.commands import serve
from sana.serving import memory


class Mallinfo2(ctypes.Structure):
    """What glibc's `mallinfo2` returns."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]  # fmt: skip


def native_bytes() -> int | None:
    """Bytes that malloc has given away and not got back, in all its heaps; None where the C library cannot say."""
    try:
        function = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return None
    function.restype = Mallinfo2
    found = function()
    return int(found.uordblks + found.hblkhd)


def holdings() -> dict[str, Any]:
    """What the process holds after a collection of cycles, and after free pages of the heap were given back.

    Returns:
        objects: that the garbage collector knows; tasks: of asyncio among them, that are not done.
        blocks: memory blocks that Python's allocator has given away.
        native_bytes: see there.
    """
    gc.collect()
    memory.give_back()
    objects = gc.get_objects()
    tasks = sum(1 for one in objects if issubclass(type(one), asyncio.Task) and not one.done())
    found = {"objects": len(objects), "tasks": tasks}
    del objects
    return {**found, "blocks": sys.getallocatedblocks(), "native_bytes": native_bytes()}


def answer() -> None:
    """Answers every line of standard input."""
    for _ in sys.stdin:
        print(json.dumps(holdings()), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Serves as `sana serve` does; returns its exit code."""
    threading.Thread(target=answer, daemon=True).start()
    return serve.main(list(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
