"""`train_log.jsonl`, one JSON object a line, and the speed of a run. Trackers are in `tracker.py`.

The file is the run's own record: a run that was killed and goes on leaves, but for timings, the log of an unbroken run.
"""

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sana.utils.distributed import is_main_process
from sana.utils.logging import get_logger

logger = get_logger(__name__)

LOG_NAME = "train_log.jsonl"
SLOW_SINK = 30.0  # seconds between two states of a progress bar that no terminal shows


class TrainLog:
    """Appends records to the log of a run; does nothing on other processes than the main one.

    Every record is one write of one whole line, so a kill leaves at most the last line half-written. Opening the log
    drops such a line and everything after `resume_step`, which the resumed run writes again.

    Args:
        path: the file, usually `work_dir/train_log.jsonl`; its folder is made.
        resume_step: the step of the checkpoint that the run goes on from; 0 begins anew.

    Attributes:
        last: the last record that was kept or written, None in an empty log.
    """

    def __init__(self, path: str | Path, *, resume_step: int = 0) -> None:
        self.path = Path(path)
        self.last: dict[str, Any] | None = None
        self._descriptor: int | None = None
        self._failed = False
        if is_main_process():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.last = _cut(self.path, resume_step)
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def write(self, values: Mapping[str, Any]) -> None:
        """Appends one record. A file that cannot be written is reported once and does not stop the run.

        Args:
            values: by name; "step" (optimiser steps done, never falling within a run) must be among them. Numbers (0-d
                tensors too), texts, booleans, None, and lists and mappings of these; a number that is not finite
                becomes null.
        """
        if self._descriptor is None:
            return
        record = {"step": int(values["step"]), **{key: plain(value) for key, value in values.items() if key != "step"}}
        line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "replace")
        size = os.fstat(self._descriptor).st_size
        try:
            written = os.write(self._descriptor, line)
            if written != len(line):
                raise OSError(f"only {written} of {len(line)} bytes could be written")
        except OSError as error:
            with suppress(OSError):  # half a line would spoil the next one; a device cannot be cut
                os.ftruncate(self._descriptor, size)
            if not self._failed:
                logger.error("%s cannot be written (%s); training goes on, records are lost", self.path, error)
            self._failed = True
            return
        self._failed = False
        self.last = record

    def sync(self) -> None:
        """Waits until the records are on the disk; called beside a checkpoint, so that a power cut loses neither."""
        if self._descriptor is not None:
            with suppress(OSError):  # the next write reports it
                os.fsync(self._descriptor)

    def close(self) -> None:
        """Closes the file; closing it again does nothing."""
        if self._descriptor is not None:
            self.sync()
            os.close(self._descriptor)
            self._descriptor = None


def read_train_log(path: str | Path) -> list[dict[str, Any]]:
    """Returns the records of a log, without a half-written last line; the log of a running run can be read.

    Raises:
        OSError: there is no such file.
    """
    with Path(path).open("rb") as file:
        return [record for line in file if (record := _parse(line)) is not None]


def plain(value: Any) -> Any:
    """Returns what strict JSON can hold: numbers that are not finite are None.

    Raises:
        TypeError: a value of no JSON kind.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if hasattr(value, "item"):  # a 0-d tensor or numpy number
        return plain(value.item())
    if not isinstance(value, float):
        raise TypeError(f"A log record cannot hold {value!r} of the type {type(value).__name__}.")
    return value if math.isfinite(value) else None


def _cut(path: Path, step: int) -> dict[str, Any] | None:
    """Rewrites a log, atomically, with its whole records up to a step; returns the last of them."""
    if not path.exists():
        return None
    last, broken = None, 0
    temporary = path.with_name(f".{path.name}.part")
    try:
        with path.open("rb") as source, temporary.open("wb") as target:
            for line in source:
                record = _parse(line)
                if record is None:
                    broken += 1
                elif record["step"] <= step:
                    target.write(line)
                    last = record
            target.flush()
            os.fsync(target.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if broken:
        logger.warning("%s: %d line(s) were no whole record and were dropped", path, broken)
    return last


def _parse(line: bytes) -> dict[str, Any] | None:
    """Returns a record, None for a line that is none."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if isinstance(step, int) and not isinstance(step, bool) else None


class Throughput:
    """Images a second and the time left, over the last steps.

    Args:
        total_steps: steps of the whole run.
        step: steps done before this process began.
        seconds: seconds the run took before this process began.
        window: number of steps the rates are taken over.
        clock: seconds, from any beginning.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        step: int = 0,
        seconds: float = 0.0,
        window: int = 100,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps, self._clock = total_steps, clock
        self._began, self._paused, self._images = clock() - seconds, 0.0, 0
        self._marks: deque[tuple[int, int, float]] = deque([(step, 0, clock())], maxlen=window + 1)

    def update(self, step: int, images: int) -> None:
        """Notes that a step is done.

        Args:
            step: steps of the run so far.
            images: images of this step, of all processes together.
        """
        self._images += images
        self._marks.append((step, self._images, self._clock() - self._paused))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves what happens inside (a validation, a checkpoint) out of the rates."""
        began = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - began

    @property
    def seconds(self) -> float:
        """Seconds since the run began, with those of earlier processes and with pauses."""
        return self._clock() - self._began

    @property
    def images_per_second(self) -> float:
        """Of all processes together; 0 before the first step."""
        (_, before, start), (_, images, now) = self._marks[0], self._marks[-1]
        return (images - before) / (now - start) if now > start else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the last step, pauses left out; None before the first step."""
        (before, _, start), (step, _, now) = self._marks[0], self._marks[-1]
        return (self.total_steps - step) * (now - start) / (step - before) if step > before else None


def progress_bar(total_steps: int, *, step: int = 0) -> "tqdm[Any]":
    """Returns the bar of a run, on standard error; other processes than the main one get one that shows nothing."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(
        total=total_steps,
        initial=step,
        desc="training",
        unit="step",
        file=sys.stderr,
        disable=not is_main_process(),
        mininterval=0.5 if terminal else SLOW_SINK,
        dynamic_ncols=True,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
    )


def describe(record: Mapping[str, Any], seconds_left: float | None = None) -> str:
    """Returns the text beside the bar: the record's loss, lr, grad_norm and images_per_second, and the time left."""
    forms = (("loss", "loss {:.4f}"), ("lr", "lr {:.2e}"), ("grad_norm", "grad {:.3f}"))
    words = [
        form.format(record[key]) if isinstance(record[key], int | float) else f"{form.split()[0]} -"
        for key, form in (*forms, ("images_per_second", "{:.4g} images/s"))
        if key in record and (record[key] is not None or key != "images_per_second")
    ]
    if seconds_left is not None:
        minutes, seconds = divmod(max(0, round(seconds_left)), 60)
        hours, minutes = divmod(minutes, 60)
        words.append(f"{hours}:{minutes:02d}:{seconds:02d} left")
    return ", ".join(words)
