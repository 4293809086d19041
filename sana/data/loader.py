"""Training batches in an exact order: reading in worker processes, broken samples, and where a run stands.

Which samples form a batch is in `batch_sampler.py`, how they are put together in `collate.py`.
"""

import hashlib
import multiprocessing
import os
import random
import signal
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from sana.data.batch_sampler import AspectRatioBatchSampler, Position
from sana.data.collate import Batch, collate
from sana.data.sample import BrokenSampleError, DataError, Dataset, Sample
from sana.utils.logging import get_logger

Request = tuple[int, list[int]]  # epoch, indices
Answer = tuple[Batch | None, dict[str, str], str]  # batch, reasons of broken keys, message of a DataError

_logger = get_logger("data.loader")


def sample_rng(seed: int, epoch: int, index: int) -> random.Random:
    """Returns the source of every choice about one sample in one epoch, whoever reads it and whenever."""
    digest = hashlib.blake2b(f"{seed} {epoch} {index}".encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest, "big"))


class BatchReader:
    """A data set of whole batches, for torch's DataLoader: a pure function of the request.

    A broken sample's place is taken by a copy of the first good sample of the batch, with weight 0. In a batch without
    any good sample all weights are 0, and the copies are of the next readable sample of the same bucket by index, else
    of any bucket: so the ranks stay in step whatever one of them finds.

    Args:
        dataset: where samples are read.
        codes: bucket number of every sample, -1 for unusable ones.
        seed: of the choices about samples.
        broken_budget: the search for a readable sample ends when more than so many are broken.
    """

    def __init__(self, dataset: Dataset, codes: np.ndarray, seed: int, broken_budget: int) -> None:
        self.dataset, self.codes, self.seed, self.broken_budget = dataset, codes, seed, broken_budget

    def __getitem__(self, request: Request) -> Answer:
        epoch, indices = request
        broken: dict[str, str] = {}
        try:
            return self._read(epoch, indices, broken), broken, ""
        except DataError as error:  # as a value: crossing processes would bury its message in a traceback
            return None, broken, str(error)

    def _read(self, epoch: int, indices: list[int], broken: dict[str, str]) -> Batch | None:
        samples = {index: self._load(epoch, index, broken) for index in dict.fromkeys(indices)}
        good = (sample for sample in samples.values() if sample is not None)
        stand_in = next(good, None) or self._search(epoch, indices, broken)
        if stand_in is None:
            return None
        return collate(
            [samples[index] or stand_in for index in indices],
            keys=[self.dataset.key(index) for index in indices],
            weights=[0.0 if samples[index] is None else 1.0 for index in indices],
            epoch=epoch,
        )

    def _load(self, epoch: int, index: int, broken: dict[str, str]) -> Sample | None:
        try:
            return self.dataset.load(index, sample_rng(self.seed, epoch, index))
        except BrokenSampleError as error:
            broken[self.dataset.key(index)] = error.reason
            return None

    def _search(self, epoch: int, indices: list[int], broken: dict[str, str]) -> Sample | None:
        first = indices[0]
        same = self.codes == self.codes[first]
        for candidates in (np.flatnonzero(same), np.flatnonzero(~same & (self.codes >= 0))):
            for index in np.roll(candidates, -int(np.searchsorted(candidates, first))).tolist():
                if len(broken) > self.broken_budget:
                    return None
                sample = None if index in indices else self._load(epoch, index, broken)
                if sample is not None:
                    return sample
        return None


class TrainingLoader:
    """The batches of one rank, endlessly, in an order and with contents that no number of workers changes.

    Args:
        dataset: what to read.
        batch_size: samples of a batch on this rank.
        seed: of the order and of every choice about a sample.
        remainder: see `AspectRatioBatchSampler`.
        order: see there.
        rank: of this process.
        world_size: how many processes read the same data.
        num_workers: processes that read ahead; 0: batches are read when asked for.
        prefetch: batches that each worker reads ahead.
        broken_budget: so many different broken samples are left out on this rank; one more is an error.
        pin_memory: batches lie in page-locked memory (needs CUDA).

    Raises:
        DataError: there is no batch to be had.
        ValueError: an argument that is not allowed.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        seed: int = 0,
        remainder: str = "pad",
        order: str = "shuffled",
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        prefetch: int = 2,
        broken_budget: int = 100,
        pin_memory: bool = False,
    ) -> None:
        if num_workers < 0 or prefetch < 1 or broken_budget < 0:
            raise ValueError(
                "num_workers and broken_budget must not be negative and prefetch must be at least 1, not "
                f"{num_workers}, {broken_budget} and {prefetch}."
            )
        self._sampler = AspectRatioBatchSampler(
            dataset.buckets(),
            batch_size,
            seed=seed,
            remainder=remainder,
            order=order,
            rank=rank,
            world_size=world_size,
            fingerprint=dataset.fingerprint(),
        )
        self._reader = BatchReader(dataset, self._sampler.codes, seed, broken_budget)
        self._options = {
            "num_workers": num_workers,
            "prefetch_factor": prefetch if num_workers else None,
            "pin_memory": pin_memory,
        }
        self._broken_budget = broken_budget
        self._broken: set[str] = set()
        self._reading: _Reading | None = None
        self._at: tuple[Position, int] = self._sampler.position, self._sampler.batches_left

    @property
    def fingerprint(self) -> str:
        """A hash of the samples' keys and buckets, which must be the same on every rank."""
        return self._sampler.fingerprint

    @property
    def epoch(self) -> int:
        """Epoch of the batch handed out last; before the first one, 0 or the epoch of the loaded state."""
        return self._at[0].epoch

    @property
    def batches_left(self) -> int:
        """Batches that this rank, as every other, still gets in this epoch."""
        return self._at[1]

    @property
    def len_epoch(self) -> int:
        """Batches of this rank in an epoch, for schedules; see `AspectRatioBatchSampler.len_epoch`."""
        return self._sampler.len_epoch

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.next_batch()

    def next_batch(self) -> Batch:
        """Returns the next batch.

        Raises:
            DataError: too many broken samples, none that can be read, or a worker process that died.
        """
        if self._reading is None:
            if self._sampler.position is not self._at[0]:
                self._sampler.go_to(self._at[0])
            self._reading = _Reading(self._reader, self._sampler, self._options)
        try:
            (batch, broken, message), at = self._reading.next()
            self._count(broken)
            if batch is None:
                raise DataError(message or "No sample can be read. Check the data set and the disk it is on.")
        except BaseException:  # what was read ahead no longer follows the batch handed out last
            self.close()
            raise
        self._at = at
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Returns where the run stands: behind the batch handed out last, whatever was read ahead.

        "sampler" is the same on all ranks that have taken equally many batches; "broken" are the keys this rank met.
        """
        return {"sampler": self._sampler.state_dict(self._at[0]), "broken": sorted(self._broken)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on behind the batch that was the last when the state was saved; also on another number of ranks.

        Raises:
            DataError: the state is damaged, or belongs to other data or to another order.
        """
        try:
            sampler, broken = dict(state["sampler"]), set(state["broken"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"The saved data position is damaged: {error!r}. Use an older checkpoint.") from error
        self.close()
        self._sampler.load_state_dict(sampler)
        self._broken = broken
        self._at = self._sampler.position, self._sampler.batches_left

    def close(self) -> None:
        """Ends the worker processes. The next batch, if one is asked for, starts new ones."""
        if self._reading is not None:
            self._reading.close()
            self._reading = None

    def _count(self, broken: dict[str, str]) -> None:
        for key, reason in broken.items():
            if key not in self._broken:
                self._broken.add(key)
                # An error, not a warning, since other ranks than the main one show nothing less.
                _logger.error(
                    "Broken sample %s is left out: %s (%d; at most %d are)",
                    *(key, reason, len(self._broken), self._broken_budget),
                )
        if len(self._broken) > self._broken_budget:
            named = ", ".join(sorted(self._broken)[:20]) + (", ..." if len(self._broken) > 20 else "")
            raise DataError(
                f"{len(self._broken)} samples are broken, more than data.extra.broken_budget={self._broken_budget}: "
                f"{named}. Repair or remove them (tools/data_check.py lists them all), or raise the budget."
            )


class _Reading:
    """One run of torch's DataLoader from one position on: batches, each with the position behind it.

    Args:
        reader: makes the batches.
        sampler: stands at the position, and runs ahead of what `next` returns.
        options: of DataLoader.
    """

    def __init__(self, reader: BatchReader, sampler: AspectRatioBatchSampler, options: dict[str, Any]) -> None:
        self._ahead: deque[tuple[Position, int]] = deque()
        self._in_processes = bool(options["num_workers"])
        self._closing = multiprocessing.RawValue("b", 0)
        loader: DataLoader[Answer] = DataLoader(
            reader,  # type: ignore[arg-type]
            sampler=_requests(sampler, self._ahead),
            batch_size=None,
            collate_fn=_unchanged,
            worker_init_fn=partial(_prepare_worker, self._closing),
            generator=torch.Generator(),  # or starting would draw from the global generator, which training uses
            **options,
        )
        self._iterator = [_start(loader)]
        self._finalizer = weakref.finalize(self, _stop, self._closing, self._iterator)

    def next(self) -> tuple[Answer, tuple[Position, int]]:
        died = ""
        try:
            answer = next(self._iterator[0])
        except Exception as error:
            if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid"):
                died = str(error)
            elif self._in_processes:  # its message has the worker's traceback; that of here would keep them alive
                raise error.with_traceback(None) from None
            else:
                raise
        if died:
            raise DataError(
                f"A process that reads data died ({died}). Most often memory is short, or shared memory (/dev/shm): "
                "use fewer workers (train.num_workers) or a machine with more."
            )
        return answer, self._ahead.popleft()

    def close(self) -> None:
        self._finalizer()


def _requests(sampler: AspectRatioBatchSampler, ahead: deque[tuple[Position, int]]) -> Iterator[Request]:
    for indices in sampler:
        ahead.append((sampler.position, sampler.batches_left))
        yield sampler.epoch, indices


def _unchanged(answer: Any) -> Any:
    return answer


def _start(loader: DataLoader) -> Iterator[Answer]:
    """Starts the workers, and leaves SIGCHLD alone.

    torch's handler would raise the error of a dead worker wherever the main process happens to be, even while it
    writes a checkpoint. Without it, asking for the next batch finds out within seconds.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    if in_main_thread and before is not None:
        signal.signal(signal.SIGCHLD, before)
    return iterator


def _stop(closing: Any, iterator: list[Iterator[Answer]]) -> None:
    closing.value = 1
    iterator.clear()  # the last reference: torch ends the workers


def _prepare_worker(closing: Any, worker: int) -> None:
    """Lets a worker live on when the whole process group is told to stop, so that the run can finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143) if closing.value else None)
