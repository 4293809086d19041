"""`StreamedShards`: captioned images read from shards from front to back, for data that is not copied here first.

Random access, which training normally uses, is in `webdataset.py`.
"""

import hashlib
import http.client
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from sana.data.sample import BrokenSampleError, DataError, Sample
from sana.data.shard_index import IMAGE_KINDS, KINDS, split_name
from sana.data.shard_list import ShardEntry, beside, list_shards
from sana.data.shard_records import Record, RecordOptions, make_sample
from sana.data.shard_urls import is_command, open_stream
from sana.data.side_files import SideEntries
from sana.data.tar_members import walk


class StreamedShards(IterableDataset):
    """Streams the records of tar shards in a fixed order, once per epoch.

    The order of the shards is drawn from (seed, epoch); records keep their order inside a shard. Every process, or
    worker of `torch.utils.data.DataLoader`, gets whole shards when there are at least as many shards as readers;
    otherwise each reads all shards and takes every n-th record. No record is given twice in an epoch.

    A shard that ends early or is damaged is an error, as is one whose records' members are not next to each other.

    Args:
        data_dir: as of `SanaWebDataset`; commands and addresses are opened as streams, nothing is kept.
        options: how records are decoded.
        rank: of this process.
        world_size: number of processes.
        seed: of the order and of captions.
        shuffle: False keeps the shards in their order.
        on_broken: called with every record that cannot be read, and with every shard that breaks off; None raises.
        external_caption_suffixes: endings of files with captions beside the shards, as of `SanaWebDataset`; those of
            shards on the web are fetched when their shard is read, and kept as other downloads are.
        external_clipscore_suffixes: endings of files with the captions' scores, likewise.

    Attributes:
        epoch: of the next iteration; one more after each.
        consumed: records given by this object in the epoch.

    In worker processes copies of this object do the work, so the main process counts, and calls `set_epoch` or
    `load_state_dict` before each iteration.

    Raises:
        DataError: no shard is found, or there are suffixes, and shards come from commands, beside which nothing is.
    """

    def __init__(
        self,
        data_dir: str | Sequence[str],
        options: RecordOptions,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        on_broken: Callable[[DataError], None] | None = None,
        external_caption_suffixes: Sequence[str] = (),
        external_clipscore_suffixes: Sequence[str] = (),
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} of {world_size} processes.")
        self.entries = list_shards(data_dir)
        self.caption_suffixes, self.score_suffixes = external_caption_suffixes, external_clipscore_suffixes
        command = next((entry.location for entry in self.entries if is_command(entry.location)), None)
        if command is not None and (self.caption_suffixes or self.score_suffixes):
            raise DataError(
                f"Beside the output of {command} there are no files with captions or scores: leave out "
                "data.external_caption_suffixes and data.external_clipscore_suffixes, or name shards by path or http."
            )
        self.options, self.seed, self.shuffle, self.on_broken = options, seed, shuffle, on_broken
        self.rank, self.world_size = rank, world_size
        self.epoch, self.consumed = 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Starts at the beginning of an epoch."""
        self.epoch, self.consumed = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """The position: the epoch, and how many records of it this process was given, broken ones included."""
        return {"epoch": self.epoch, "consumed": self.consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on behind the records that were given. What lies before is read, but not decoded.

        With n worker processes (batch_size=None) `consumed` is what the loader gave; workers take turns, so the number
        of workers must be the same as before.
        """
        self.epoch, self.consumed = int(state["epoch"]), int(state["consumed"])

    def fingerprint(self) -> str:
        """A hash of the names of the shards; their keys are not known before they are read."""
        return hashlib.sha256("\n".join(entry.name for entry in self.entries).encode()).hexdigest()

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        skipped = self.consumed // workers + (number < self.consumed % workers)
        reader, readers = self.rank * workers + number, self.world_size * workers
        for position, record in enumerate(self._records(reader, readers)):
            if position < skipped:
                continue
            self.consumed += 1
            try:
                sample = record if isinstance(record, DataError) else self._sample(record)
            except BrokenSampleError as error:
                sample = error
            if isinstance(sample, Sample):
                yield sample
            elif self.on_broken is None:
                raise sample
            else:
                self.on_broken(sample)
        self.set_epoch(self.epoch + 1)

    def order(self) -> list[ShardEntry]:
        """The shards in the order of the present epoch."""
        order = list(self.entries)
        if self.shuffle:
            random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        return order

    def records_of(self, entry: ShardEntry) -> Iterator[Record | DataError]:
        """Yields the records of one shard with what files beside it say; last the error that it broke off with, if any.

        Raises:
            DataError: a file beside the shard is damaged.
            FetchError: it is there, and cannot be fetched.
        """
        captions, scores = (
            [SideEntries(path) for suffix in suffixes if (path := beside(entry.location, Path(entry.location), suffix))]
            for suffixes in (self.caption_suffixes, self.score_suffixes)
        )
        for record in records_of(entry):
            if isinstance(record, Record) and (captions or scores):
                found = [[file.entry(record.name) for file in files] for files in (captions, scores)]
                record = replace(record, side_captions=found[0], side_scores=found[1])
            yield record

    def _records(self, reader: int, readers: int) -> Iterator[Record | DataError]:
        order = self.order()
        if len(order) >= readers:
            for entry in order[reader::readers]:
                yield from self.records_of(entry)
            return
        number = 0
        for entry in order:
            for record in self.records_of(entry):
                if number % readers == reader:
                    yield record
                number += 1

    def _sample(self, record: Record) -> Sample:
        bucket = self.options.bucket(*record.image_size(self.options))
        return make_sample(record, self.options, bucket, random.Random(f"{self.seed} {self.epoch} {record.key}"))


def records_of(entry: ShardEntry) -> Iterator[Record | DataError]:
    """Yields the records of one shard; last the error that it broke off with, if any."""
    seen: set[str] = set()
    members: dict[str, bytes] = {}
    name, count = "", 0
    try:
        with open_stream(entry.location) as file:
            for member, read in walk(file, entry.location):
                key, kind = split_name(member.name)
                if not key or kind not in KINDS:
                    continue
                if key != name:
                    if _is_record(members):
                        count += 1
                        yield _record(entry, name, members)
                    if key in seen:
                        raise DataError(
                            f"{entry.location}: the members of {key} are not next to each other, so it cannot be "
                            "streamed: use SanaWebDataset, which copies it first, or pack it anew."
                        )
                    seen.add(key)
                    name, members = key, {}
                if kind in members:
                    raise DataError(f"{entry.location} holds {member.name} twice.")
                members[kind] = read()
        if _is_record(members):
            count += 1
            yield _record(entry, name, members)
        if entry.nsamples not in (None, count, len(seen)):
            raise DataError(f"{entry.location} gave {count} records, and its wids-meta.json says {entry.nsamples}.")
    except DataError as error:
        yield error
    except (OSError, http.client.HTTPException) as error:
        yield DataError(f"{entry.location} broke off: {error!r}.")


def _is_record(members: dict[str, bytes]) -> bool:
    return any(kind in members for kind in (*IMAGE_KINDS, "npy"))


def _record(entry: ShardEntry, name: str, members: dict[str, bytes]) -> Record:
    def read(kind: str) -> bytes:
        if kind not in members:
            raise BrokenSampleError(f"{entry.name}/{name}", f"{entry.location} has no .{kind} for it")
        return members[kind]

    return Record(name, f"{entry.name}/{name}", tuple(members), read)
