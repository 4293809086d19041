"""Training batches from shards that are streamed: buckets fill as samples arrive, and the place is saved exactly.

How shards are opened and cut into records is in `shard_stream.py`; data with random access is read by `loader.py`.
"""

import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

from sana.data.collate import Batch, collate
from sana.data.sample import BrokenSampleError, DataError, Sample
from sana.data.shard_list import ShardEntry
from sana.data.shard_records import Record, make_sample
from sana.data.shard_stream import StreamedShards
from sana.utils.logging import get_logger

_logger = get_logger("data.stream_loader")

Place = tuple[int, int, int]  # pass over the shards, place of the shard in this rank's order, record in the shard
Waiting = dict[str, list[tuple[Place, Record]]]  # bucket -> records that do not fill a batch yet


class StreamLoader:
    """The batches of one rank, endlessly, with the interface of `TrainingLoader`.

    A rank reads its own shards from front to back, over and over, in an order drawn from (seed, pass); with fewer
    shards than ranks it takes every world_size-th record of all of them. So no record is given twice in a pass. A
    record waits, undecoded, in its bucket until that is full. What waits at the end of a pass goes on into the next
    one (as remainder "carry"), and a rank whose shards hold less begins its next pass earlier.

    An epoch is therefore a number of batches, the same on every rank: the samples of all shards, as their
    wids-meta.json or `samples` says, divided by the samples of a step.

    The state holds where each waiting record is, not its bytes: resuming reads the shards of those records again up to
    them, and the shard that was being read up to the saved place. With another number of ranks the pass is given up
    and another one begins, since the shards are dealt out anew.

    Args:
        shards: what to read; of it the shards, options, seed, rank, world size and shuffling are used.
        batch_size: samples of a batch on this rank.
        samples: of an epoch over all ranks; None: the wids-meta.json of every shard says how many it holds.
        num_workers: threads that decode the images of a batch, one batch ahead; 0: batches are read when asked for.
        broken_budget: so many different broken records or shards are left out on this rank; one more is an error.
        pin_memory: batches lie in page-locked memory (needs CUDA).

    Raises:
        DataError: the length of an epoch is not known, or is less than one batch for each rank.
        ValueError: an argument that is not allowed.
    """

    def __init__(
        self,
        shards: StreamedShards,
        batch_size: int,
        *,
        samples: int | None = None,
        num_workers: int = 0,
        broken_budget: int = 100,
        pin_memory: bool = False,
    ) -> None:
        if batch_size < 1 or num_workers < 0 or broken_budget < 0:
            raise ValueError(
                "batch_size must be at least 1, num_workers and broken_budget not negative, not "
                f"{batch_size}, {num_workers} and {broken_budget}."
            )
        self.shards, self.batch_size, self.num_workers = shards, batch_size, num_workers
        self.broken_budget, self.pin_memory = broken_budget, pin_memory
        self.fingerprint = shards.fingerprint()
        self.len_epoch = _epoch_samples(shards, samples) // (batch_size * shards.world_size)
        if not self.len_epoch:
            raise DataError(
                f"{_epoch_samples(shards, samples)} samples an epoch do not fill one batch of {batch_size} on each of "
                f"{shards.world_size} processes: use a smaller batch size."
            )
        self._at: dict[str, Any] = {"epoch": 0, "taken": 0, "next": (0, 0, 0), "waiting": {}, "broken": []}
        self._reading: Iterator[tuple[Batch, dict[str, Any]]] | None = None
        self._reader: ThreadPoolExecutor | None = None
        self._decoders: ThreadPoolExecutor | None = None
        self._ahead: deque[Future[tuple[Batch, dict[str, Any]]]] = deque()

    @property
    def epoch(self) -> int:
        """Epoch of the batch handed out last."""
        return int(self._at["epoch"])

    @property
    def batches_left(self) -> int:
        """Batches that this rank, as every other, still gets in this epoch."""
        return self.len_epoch - int(self._at["taken"])

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.next_batch()

    def next_batch(self) -> Batch:
        """Returns the next batch.

        Raises:
            DataError: too many broken records, or none in a whole pass.
        """
        if self._reading is None:
            self._reading = self._batches(dict(self._at))
        try:
            batch, self._at = self._next()
        except BaseException:  # what was read ahead no longer follows the batch handed out last
            self.close()
            raise
        return batch.pin_memory() if self.pin_memory else batch

    def state_dict(self) -> dict[str, Any]:
        """Returns where the run stands: behind the batch handed out last, whatever was read ahead."""
        sizes = {"world_size": self.shards.world_size, "len_epoch": self.len_epoch, "seed": self.shards.seed}
        return {"version": 1, "fingerprint": self.fingerprint, **sizes, **self._at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on behind the batch that was the last when the state was saved.

        Raises:
            DataError: the state is damaged, or belongs to other shards, another seed or another kind of data.
        """
        expected = {"version": 1, "fingerprint": self.fingerprint, "seed": self.shards.seed}
        for key, value in expected.items():
            if state.get(key) != value:
                raise DataError(
                    f"The saved data position does not fit: its {key} is {state.get(key)!r}, here it is {value!r}. "
                    "Restore the data and settings of that run, or start without its data position."
                )
        try:
            at = {key: state[key] for key in self._at}
            at["waiting"] = {
                str(bucket): [_place(place) for place in places] for bucket, places in at["waiting"].items()
            }
            at["next"] = _place(at["next"])
            length, world_size = int(state["len_epoch"]), int(state["world_size"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"The saved data position is damaged: {error!r}. Use an older checkpoint.") from error
        if world_size != self.shards.world_size:
            done = at["epoch"] * length + at["taken"]  # the same on all ranks, and no smaller than any pass's number
            at |= {"next": (done, 0, 0), "waiting": {}}
        at["taken"] = min(round(at["taken"] * self.len_epoch / length), self.len_epoch)
        self.close()
        self._at = at

    def close(self) -> None:
        """Ends the threads. The next batch, if one is asked for, starts new ones."""
        for pool in (self._reader, self._decoders):
            if pool is not None:
                pool.shutdown(cancel_futures=True)
        self._reader = self._decoders = self._reading = None
        self._ahead.clear()

    def _next(self) -> tuple[Batch, dict[str, Any]]:
        assert self._reading is not None
        if not self.num_workers:
            return next(self._reading)
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, "stream")
            self._decoders = ThreadPoolExecutor(self.num_workers, "decode")
        while len(self._ahead) < 2:
            self._ahead.append(self._reader.submit(next, self._reading))
        return self._ahead.popleft().result()

    def _batches(self, at: dict[str, Any]) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Batches from a place on, each with the place behind it."""
        broken = set(at["broken"])
        waiting = self._read_again(at["waiting"])
        for place, record in self._records(at["next"]):
            bucket = self._bucket(record, broken)
            if bucket is None or isinstance(record, DataError):
                continue
            waiting.setdefault(bucket, []).append((place, record))
            if len(waiting[bucket]) < self.batch_size:
                continue
            samples = self._decode(bucket, waiting[bucket], broken)
            waiting[bucket] = [one for one, sample in zip(waiting[bucket], samples, strict=True) if sample is not None]
            good = [sample for sample in samples if sample is not None]
            if len(good) < self.batch_size:
                continue  # others will come
            del waiting[bucket]
            ended = at["taken"] == self.len_epoch
            at = {
                "epoch": at["epoch"] + ended,
                "taken": 1 if ended else at["taken"] + 1,
                "next": (place[0], place[1], place[2] + 1),
                "waiting": {name: [where for where, _ in entries] for name, entries in waiting.items()},
                "broken": sorted(broken),
            }
            yield collate(good, [sample.key for sample in good], [1.0] * len(good), at["epoch"]), at

    def _decode(self, bucket: str, records: list[tuple[Place, Record]], broken: set[str]) -> list[Sample | None]:
        def decode(one: tuple[Place, Record]) -> Sample | BrokenSampleError:
            (number, _, _), record = one
            rng = random.Random(f"{self.shards.seed} {number} {record.key}")
            try:
                return make_sample(record, self.shards.options, bucket, rng)
            except BrokenSampleError as error:
                return error

        decoded = list(self._decoders.map(decode, records) if self._decoders else map(decode, records))
        for error in decoded:
            if isinstance(error, BrokenSampleError):
                self._count(error.key, error.reason, broken)
        return [sample if isinstance(sample, Sample) else None for sample in decoded]

    def _bucket(self, record: Record | DataError, broken: set[str]) -> str | None:
        """The bucket of a record; None where there is none, which is counted."""
        try:
            if isinstance(record, DataError):
                self._count(str(record), "the shard is left there", broken)
                return None
            return self.shards.options.bucket(*record.image_size(self.shards.options))
        except BrokenSampleError as error:
            self._count(error.key, error.reason, broken)
            return None

    def _count(self, key: str, reason: str, broken: set[str]) -> None:
        if key not in broken:
            broken.add(key)
            _logger.error(
                "Broken sample %s is left out: %s (%d; at most %d are)", key, reason, len(broken), self.broken_budget
            )
        if len(broken) > self.broken_budget:
            raise DataError(
                f"{len(broken)} records or shards are broken, more than data.extra.broken_budget="
                f"{self.broken_budget}: {', '.join(sorted(broken)[:20])}. Repair them, or raise the budget."
            )

    def _records(self, place: Place) -> Iterator[tuple[Place, Record | DataError]]:
        """Records of this rank from a place on, pass after pass.

        Raises:
            DataError: a whole pass has no record.
        """
        number, shard, first = place
        while True:
            found, order = False, self._order(number)
            for position in range(shard, len(order)):
                for count, record in self._mine(order[position], position, len(order), first):
                    found = found or isinstance(record, Record)
                    yield (number, position, count), record
                first = 0
            if not found and not shard:
                raise DataError(f"Process {self.shards.rank} found no record in a pass over its {len(order)} shards.")
            number, shard, first = number + 1, 0, 0

    def _order(self, number: int) -> list[ShardEntry]:
        """This rank's shards in a pass; all of them where there are fewer than ranks."""
        self.shards.set_epoch(number)
        order, ranks = self.shards.order(), self.shards.world_size
        return order[self.shards.rank :: ranks] if len(order) >= ranks else order

    def _mine(
        self, entry: ShardEntry, position: int, shards: int, first: int
    ) -> Iterator[tuple[int, Record | DataError]]:
        split = len(self.shards.entries) < self.shards.world_size
        for count, record in enumerate(self.shards.records_of(entry)):
            others = split and isinstance(record, Record)
            if count < first or (others and (count + position) % self.shards.world_size != self.shards.rank):
                continue
            yield count, record

    def _read_again(self, waiting: dict[str, list[Place]]) -> Waiting:
        """The records at the given places, whose shards are opened once each.

        Raises:
            DataError: a shard does not hold what it held.
        """
        wanted: dict[tuple[int, int], set[int]] = {}
        for number, shard, count in (place for places in waiting.values() for place in places):
            wanted.setdefault((number, shard), set()).add(count)
        found: dict[Place, Record] = {}
        for (number, shard), counts in sorted(wanted.items()):
            entry = self._order(number)[shard]
            for count, record in enumerate(islice(self.shards.records_of(entry), max(counts) + 1)):
                if count in counts and isinstance(record, Record):
                    found[number, shard, count] = record
            if len(counts) > sum(place[:2] == (number, shard) for place in found):
                raise DataError(f"{entry.location} no longer gives the records that a saved run had read from it.")
        return {bucket: [(place, found[place]) for place in places] for bucket, places in waiting.items()}


def _epoch_samples(shards: StreamedShards, samples: int | None) -> int:
    counted = [entry.nsamples for entry in shards.entries]
    if samples is None and None in counted:
        raise DataError(
            f"How many records {shards.entries[counted.index(None)].location} holds is not known before it is read: "
            "give data.extra.stream_samples, the number of all samples, or a wids-meta.json."
        )
    return samples if samples is not None else sum(count or 0 for count in counted)


def _place(value: Any) -> Place:
    number, shard, count = (int(part) for part in value)
    if min(number, shard, count) < 0:
        raise ValueError(f"place {value!r}")
    return number, shard, count
