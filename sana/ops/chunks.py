"""Loops over chunks that are alike, of which a model of memory runs a few. Where tensors are cut is not said here."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Chunk = TypeVar("Chunk")

_few: ContextVar[bool] = ContextVar("few", default=False)


def every(chunks: Sequence[Chunk]) -> Sequence[Chunk]:
    """Returns the chunks of a loop: all of them, or within `few` the first three and the last."""
    if not _few.get() or len(chunks) <= 4:
        return chunks
    return [*chunks[:3], chunks[-1]]  # the third holds what is left of the second


@contextmanager
def few() -> Iterator[None]:
    """Within it loops are cut short: for tensors without numbers, whose memory is all that is asked for."""
    token = _few.set(True)
    try:
        yield
    finally:
        _few.reset(token)
