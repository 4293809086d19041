"""The order of the data: which samples form the next batch of a process, and where in that order a run stands.

How an epoch is cut into batches is in `epoch_plan.py`. No sample is read here: that is `loader.py`.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sana.config_extra import ORDERS, REMAINDERS
from sana.data.epoch_plan import EpochPlan, encode_buckets, index_type, permutation
from sana.data.sample import DataError


@dataclass(frozen=True, eq=False)
class Position:
    """A place in the order, equal on all ranks whenever all have taken equally many batches.

    Attributes:
        epoch: number of the epoch, from 0.
        carried: samples that earlier epochs left over (remainder "carry"); they come first in this one.
        cuts: (batch_size, world_size, global batches handed out) of every way this epoch was cut into batches so far;
            the last one is in use, the earlier ones come from runs of other sizes.
    """

    epoch: int
    carried: np.ndarray
    cuts: tuple[tuple[int, int, int], ...]

    @property
    def handed_out(self) -> int:
        """Global batches handed out by the cut in use."""
        return self.cuts[-1][2]

    def after(self, batches: int) -> "Position":
        """Returns the position that many global batches further."""
        batch_size, world_size, handed_out = self.cuts[-1]
        return replace(self, cuts=(*self.cuts[:-1], (batch_size, world_size, handed_out + batches)))


class AspectRatioBatchSampler:
    """An endless stream of one rank's batches of sample indices, every batch of one bucket and of full size.

    The order is a pure function of the seed, the buckets and the batch size: an epoch is a permutation of the samples
    drawn from (seed, epoch); samples fall into their buckets in that order; a full bucket is the next global batch.
    Of every world_size global batches (a round) each rank takes one, so all ranks have equally many batches an epoch.

    What fills no batch at the end of an epoch, and batches that fill no round, follow `remainder`:
    "pad": a short batch is filled with samples of its bucket from the start of the epoch, over and over if need be,
    and the last round with the first batches, so every sample is seen at least once an epoch, however few there are;
    "drop": both are left out; "carry": both go on into the next epoch, whose samples fill them up.

    order="official" is the released order: no shuffling, one contiguous share of the samples per rank, and samples
    that fill no batch are left out (K14), whatever `remainder` says. Unlike officially the epoch ends for all ranks
    when the first has no more batches, since ranks that differ in that wait for each other for ever.

    Args:
        buckets: the bucket of every sample, by index; None: the sample is in no batch.
        batch_size: samples of a batch on one rank.
        seed: of the permutations, not negative.
        remainder: "pad", "drop" or "carry".
        order: "shuffled", "sequential" (by index) or "official".
        rank: of this process.
        world_size: how many ranks there are.
        fingerprint: of the data set; a saved position is accepted only for the same one.
        drop_last: of order "official" alone: False hands the samples that fill no batch out as short batches.

    Raises:
        DataError: there is no batch to be had; the message says what to change.
        ValueError: an argument that is not allowed.
    """

    _position: Position
    _planned: tuple[np.ndarray, EpochPlan] | None  # made when first asked for

    def __init__(
        self,
        buckets: Sequence[str | None],
        batch_size: int,
        *,
        seed: int = 0,
        remainder: str = "pad",
        order: str = "shuffled",
        rank: int = 0,
        world_size: int = 1,
        fingerprint: str = "",
        drop_last: bool = True,
    ) -> None:
        _check(batch_size, seed, remainder, order, rank, world_size)
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.remainder, self.order, self.drop_last = remainder, order, drop_last
        self.codes, digest = encode_buckets(buckets)
        self.fingerprint = hashlib.sha256(f"{fingerprint}\n{digest}".encode()).hexdigest()
        self._usable: np.ndarray = np.flatnonzero(self.codes >= 0).astype(index_type(len(self.codes)))
        self._counts = np.bincount(self.codes[self._usable]) if len(self._usable) else np.zeros(0, np.int64)
        self.go_to(Position(0, self._usable[:0], ((batch_size, world_size, 0),)))
        self._refuse_emptiness()

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        while self.batches_left == 0:
            self._next_epoch()
        number = self._position.handed_out + self.rank
        places = self._epoch_plan.batch(number % len(self._epoch_plan))
        missing = self.batch_size - len(places)
        if missing and self.order != "official":
            stream = self._stream
            bucket = np.flatnonzero(self.codes[stream] == self.codes[stream[places[0]]])
            places = np.concatenate([places, np.resize(bucket, missing)])
        self._position = self._position.after(self.world_size)
        return self._stream[places].tolist()

    @property
    def position(self) -> Position:
        """Where the order stands: behind the batch handed out last."""
        return self._position

    @property
    def epoch(self) -> int:
        """Epoch of the batch handed out last; before the first one, 0 or the epoch of the loaded state."""
        return self._position.epoch

    @property
    def batches_left(self) -> int:
        """Batches that each rank still gets in this epoch."""
        left = len(self._epoch_plan) - self._position.handed_out
        if self.order != "official" and self.remainder == "pad":
            left += self.world_size - 1
        return max(left // self.world_size, 0)

    @property
    def len_epoch(self) -> int:
        """Batches of each rank in an epoch, for schedules: constant, and the average for "carry".

        For order "official" it is the official length, which counts the samples and not the batches they make.
        """
        if self.order == "official":
            share = len(self.codes) // self.world_size
            return share // self.batch_size if self.drop_last else -(-share // self.batch_size)
        if self.remainder == "carry":
            return max(len(self._usable) // (self.batch_size * self.world_size), 1)
        return self.batches_per_epoch(0)

    def batches_per_epoch(self, epoch: int) -> int:
        """Returns how many batches each rank gets in an epoch that is cut with the present sizes as a whole.

        Args:
            epoch: its number. Only for "carry" does the answer depend on it, and only the present epoch and later ones
                are known then.

        Raises:
            ValueError: a past epoch of remainder "carry".
        """
        if self.order == "official":
            return len(self._plan(self._fresh_stream(0), ((self.batch_size, self.world_size, 0),))) // self.world_size
        if self.remainder == "pad":
            return -(-int((-(-self._counts // self.batch_size)).sum()) // self.world_size)
        if self.remainder == "drop":
            return int((self._counts // self.batch_size).sum()) // self.world_size
        past = epoch - self._position.epoch
        if past < 0:
            raise ValueError(f"Epoch {epoch} is over, and what it carried over is not known in epoch {self.epoch}.")
        carried = np.bincount(self.codes[self._position.carried], minlength=len(self._counts))

        def rounds(epochs: int) -> int:
            return int(((carried + epochs * self._counts) // self.batch_size).sum()) // self.world_size

        return rounds(past + 1) - (rounds(past) if past else 0)

    def go_to(self, position: Position) -> None:
        """Goes on behind an earlier `position` of this sampler."""
        self._position = position
        self._planned = None

    def state_dict(self, position: Position | None = None) -> dict[str, Any]:
        """Returns the position as ints, strings and lists, the same on every rank between two rounds.

        Args:
            position: an earlier `position` of this sampler; None: the present one.
        """
        position = position or self._position
        return {
            "version": 1,
            "fingerprint": self.fingerprint,
            "length": len(self.codes),
            **self._rules(),
            "epoch": position.epoch,
            "carried": position.carried.tolist(),
            "cuts": [list(cut) for cut in position.cuts],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved position, also from one of another batch size or world size.

        With other sizes, the samples that the epoch has not handed out yet are cut anew, in their old order: within
        the epoch none is seen twice (but for padding) and none is lost (but for what "drop" leaves out).

        Raises:
            DataError: the state is damaged, or belongs to other data or to another order.
        """
        expected = {"version": 1, "length": len(self.codes), "fingerprint": self.fingerprint, **self._rules()}
        names = {"length": "number of samples", "fingerprint": "data (keys or buckets)"}
        for key, value in expected.items():
            if state.get(key) != value:
                raise DataError(
                    f"The saved data position does not fit: its {names.get(key, key)} is {state.get(key)!r}, here it "
                    f"is {value!r}. Restore the data and settings of that run, or start without its data position."
                )
        self.go_to(self._decode(state))

    def _decode(self, state: dict[str, Any]) -> Position:
        try:
            cuts = [(int(size), int(world), int(count)) for size, world, count in state["cuts"]]
            carried = np.array(state["carried"], self._usable.dtype)
            epoch = int(state["epoch"])
            sound = bool(cuts) and all(min(cut[0], cut[1], cut[2] + 1) > 0 for cut in cuts)
            sound = sound and epoch >= 0 and bool(((carried >= 0) & (carried < len(self.codes))).all())
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"The saved data position is damaged: {error!r}. Use an older checkpoint.") from error
        if not sound or (self.codes[carried] < 0).any():
            raise DataError("The saved data position is damaged: its numbers are impossible. Use an older checkpoint.")
        batch_size, world_size, handed_out = cuts[-1]
        if batch_size == self.batch_size and (self.order != "official" or world_size == self.world_size):
            cuts[-1] = (batch_size, self.world_size, handed_out)
        else:
            cuts.append((self.batch_size, self.world_size, 0))
        return Position(epoch, carried, tuple(cuts))

    def _rules(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("seed", "order", "remainder", "drop_last")}

    def _next_epoch(self) -> None:
        carried = self._usable[:0]
        if self.order != "official" and self.remainder == "carry":
            carried = self._stream[self._epoch_plan.left(self._position.handed_out)]
        self.go_to(Position(self._position.epoch + 1, carried, ((self.batch_size, self.world_size, 0),)))

    @property
    def _stream(self) -> np.ndarray:
        """The epoch's samples in their order."""
        return self._made()[0]

    @property
    def _epoch_plan(self) -> EpochPlan:
        return self._made()[1]

    def _made(self) -> tuple[np.ndarray, EpochPlan]:
        if self._planned is None:
            stream = np.concatenate([self._position.carried, self._fresh_stream(self._position.epoch)])
            self._planned = stream, self._plan(stream, self._position.cuts)
        return self._planned

    def _fresh_stream(self, epoch: int) -> np.ndarray:
        if self.order == "official":
            return np.arange(len(self.codes), dtype=self._usable.dtype)
        if self.order == "sequential":
            return self._usable
        return self._usable[permutation(len(self._usable), self.seed, epoch)]

    def _plan(self, stream: np.ndarray, cuts: tuple[tuple[int, int, int], ...]) -> EpochPlan:
        official = self.order == "official"
        tails = not self.drop_last if official else self.remainder == "pad"
        codes = self.codes[stream]
        places = np.arange(len(stream), dtype=self._usable.dtype)
        for number, (batch_size, world_size, handed_out) in enumerate(cuts):
            lanes = world_size if official else 1
            plan = EpochPlan(places, codes, batch_size, lanes=lanes, tails=tails, by_bucket=official)
            if number + 1 < len(cuts):
                places = plan.left(handed_out)
        return plan

    def _refuse_emptiness(self) -> None:
        if not len(self._usable):
            raise DataError(f"None of the {len(self.codes)} samples can be used: give a folder with readable images.")
        if (self.order == "official" or self.remainder == "drop") and not self.batches_per_epoch(0):
            raise DataError(
                f"An epoch has no batch: {len(self._usable)} samples in {np.count_nonzero(self._counts)} buckets do "
                f"not fill a batch of {self.batch_size} for each of {self.world_size} processes. Use a smaller batch "
                "size, or remainder 'pad' or 'carry' (not with order 'official')."
            )


def _check(batch_size: int, seed: int, remainder: str, order: str, rank: int, world_size: int) -> None:
    if batch_size < 1 or seed < 0:
        raise ValueError(f"batch_size must be at least 1 and seed not negative, not {batch_size} and {seed}.")
    if remainder not in REMAINDERS or order not in ORDERS:
        raise ValueError(
            f"remainder is {remainder!r}, allowed is {', '.join(REMAINDERS)}; order is {order!r}, allowed is "
            f"{', '.join(ORDERS)}."
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be between 0 and world_size - 1, not {rank} of {world_size}.")
