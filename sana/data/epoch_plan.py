"""How the samples of an epoch are shuffled and cut into batches of one bucket, as arrays: no list of all batches.

Pure functions of their arguments; which batch comes next, and for whom, is in `batch_sampler.py`.
"""

import hashlib
from collections.abc import Sequence

import numpy as np


def encode_buckets(buckets: Sequence[str | None]) -> tuple[np.ndarray, str]:
    """Numbers the buckets in the order of their ratios, as the tables of `aspect_ratio.py` do.

    Returns:
        The number of every sample's bucket, -1 for None, and a hash of all buckets.
    """

    def by_ratio(name: str) -> tuple[int, float, str]:
        try:
            return 0, float(name), name
        except ValueError:
            return 1, 0.0, name

    names = sorted({name for name in buckets if name is not None}, key=by_ratio)
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(names)} | {None: -1}
    kind = np.int16 if len(names) < 2**15 else np.int32  # 16 bits sort much faster
    codes = np.fromiter(map(numbers.__getitem__, buckets), kind, len(buckets))
    return codes, hashlib.sha256(repr(names).encode() + codes.tobytes()).hexdigest()


def permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """Returns 0 .. length - 1 shuffled, the same in every numpy release and on every machine."""
    # numpy promises that for the raw numbers of a bit generator, not for Generator.permutation(). The place in the low
    # bits makes every key unique, so that no sorting method can order two of them differently.
    bits = np.uint64(length.bit_length())
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(length) >> bits << bits
    keys |= np.arange(length, dtype=np.uint64)
    keys.sort()
    return (keys & ((np.uint64(1) << bits) - np.uint64(1))).astype(index_type(length))


def index_type(length: int) -> type:
    """Returns the smallest type that indices of so many samples fit in, twice (carried and fresh)."""
    return np.int32 if length < 2**30 else np.int64


class EpochPlan:
    """The global batches of what is left of an epoch; all numbers are places in the epoch's stream of samples.

    Args:
        places: places not handed out yet, ascending.
        codes: bucket number of every place of the stream; -1 is in no batch.
        batch_size: samples of a batch.
        lanes: the places are divided into so many equal neighbouring parts, each cut by itself, and batches are taken
            from the parts in turn until one has no more.
        tails: whether samples that fill no batch form short ones, at the end.
        by_bucket: the order of the short batches is that of the buckets, else that of their last samples.
    """

    def __init__(
        self, places: np.ndarray, codes: np.ndarray, batch_size: int, *, lanes: int, tails: bool, by_bucket: bool
    ) -> None:
        share = len(places) // lanes
        parts = [places[lane * share : (lane + 1) * share] for lane in range(lanes)]
        self._places, self._stream_length = places, len(codes)
        self._lanes = [_cut(part, codes, batch_size, tails, by_bucket) for part in parts]
        self._length = lanes * min(len(starts) for _, starts, _ in self._lanes)

    def __len__(self) -> int:
        return self._length

    def batch(self, number: int) -> np.ndarray:
        """Returns the places of a global batch."""
        turn, lane = divmod(number, len(self._lanes))
        members, starts, lengths = self._lanes[lane]
        return members[starts[turn] : starts[turn] + lengths[turn]]

    def left(self, handed_out: int) -> np.ndarray:
        """Returns the places that are in none of the first `handed_out` batches, ascending."""
        here = np.ones(self._stream_length, bool)
        for lane, (members, starts, lengths) in enumerate(self._lanes):
            turns = len(range(lane, min(handed_out, self._length), len(self._lanes)))
            here[members[np.repeat(starts[:turns], lengths[:turns]) + _within(lengths[:turns])]] = False
        return self._places[here[self._places]]


def _within(counts: np.ndarray) -> np.ndarray:
    """Returns 0 .. counts[0] - 1, 0 .. counts[1] - 1, ... in one array."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _cut(
    places: np.ndarray, codes: np.ndarray, batch_size: int, tails: bool, by_bucket: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lets places fall into their buckets; a bucket that is full is the next batch.

    Returns:
        The places sorted by bucket, and where in them every batch starts and how long it is.
    """
    code = codes[places]
    if (code < 0).any():
        places, code = places[code >= 0], code[code >= 0]
    members = places[np.argsort(code, kind="stable")]
    counts = np.bincount(code) if len(code) else np.zeros(0, np.int64)
    first, full = np.cumsum(counts) - counts, counts // batch_size
    starts = np.repeat(first, full) + batch_size * _within(full)
    starts = starts[np.argsort(members[starts + batch_size - 1])]
    lengths = np.full(len(starts), batch_size)
    if tails:
        short = np.flatnonzero(counts % batch_size)
        if not by_bucket:
            short = short[np.argsort(members[(first + counts - 1)[short]])]
        starts = np.concatenate([starts, (first + full * batch_size)[short]])
        lengths = np.concatenate([lengths, (counts % batch_size)[short]])
    return members, starts, lengths
