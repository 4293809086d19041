"""The order of the data: what an epoch holds, ranks in step, and exact positions, over random sets and sizes."""

import io
import json
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sana.data.batch_sampler import AspectRatioBatchSampler
from sana.data.sample import DataError

BUCKETS = ["0.5", "1.0", "2.0"]
bucket_lists = st.lists(st.sampled_from([*BUCKETS, None]), min_size=1, max_size=40).filter(any)
batch_sizes = st.integers(1, 6)
worlds = st.integers(1, 4)
orders = st.sampled_from(["shuffled", "sequential"])
thorough = settings(max_examples=30, deadline=None)


class Ranks:
    """The samplers of all ranks, advanced together."""

    def __init__(self, buckets, batch_size, world, state=None, **options) -> None:
        self.samplers = [
            AspectRatioBatchSampler(buckets, batch_size, rank=rank, world_size=world, **options)
            for rank in range(world)
        ]
        for sampler in self.samplers:
            if state is not None:
                sampler.load_state_dict(state)

    def round(self) -> list[list[int]]:
        return [next(sampler) for sampler in self.samplers]

    def rest_of_epoch(self) -> list[list[int]]:
        batches = []
        while self.samplers[0].batches_left:
            batches += self.round()
        assert {sampler.batches_left for sampler in self.samplers} == {0}
        return batches

    def state(self) -> dict:
        states = [sampler.state_dict() for sampler in self.samplers]
        assert all(state == states[0] for state in states)
        return json.loads(json.dumps(states[0]))


def usable(buckets) -> set[int]:
    return {index for index, bucket in enumerate(buckets) if bucket is not None}


def flat(batches) -> list[int]:
    return [index for batch in batches for index in batch]


def padded_rounds(buckets, samples, batch_size, world) -> int:
    """Rounds that samples fill when every bucket's last batch and the last round are padded."""
    counts = Counter(buckets[index] for index in samples)
    return -(-sum(-(-count // batch_size) for count in counts.values()) // world)


@thorough
@given(bucket_lists, batch_sizes, worlds, orders, st.integers(0, 2**40))
def test_pad_gives_full_batches_of_one_bucket_and_every_sample(buckets, batch_size, world, order, seed) -> None:
    ranks = Ranks(buckets, batch_size, world, order=order, seed=seed)
    for epoch in range(2):
        batches = [*ranks.round(), *ranks.rest_of_epoch()]
        assert all(len(batch) == batch_size and len({buckets[index] for index in batch}) == 1 for batch in batches)
        assert set(flat(batches)) == usable(buckets)
        assert len(batches) == world * padded_rounds(buckets, usable(buckets), batch_size, world)
        assert ranks.samplers[0].batches_per_epoch(epoch) == ranks.samplers[0].len_epoch == len(batches) // world


@thorough
@given(bucket_lists, batch_sizes, worlds, orders)
def test_drop_repeats_nothing_and_leaves_out_what_fills_no_round(buckets, batch_size, world, order) -> None:
    counts = Counter(bucket for bucket in buckets if bucket)
    rounds = sum(count // batch_size for count in counts.values()) // world
    if not rounds:
        with pytest.raises(DataError, match="An epoch has no batch"):
            Ranks(buckets, batch_size, world, order=order, remainder="drop")
        return
    ranks = Ranks(buckets, batch_size, world, order=order, remainder="drop")
    for _ in range(2):
        batches = [*ranks.round(), *ranks.rest_of_epoch()]
        assert all(len(batch) == batch_size and len({buckets[index] for index in batch}) == 1 for batch in batches)
        assert len(set(flat(batches))) == len(flat(batches)) == rounds * world * batch_size
        assert ranks.samplers[0].batches_per_epoch(5) == ranks.samplers[0].len_epoch == rounds


@thorough
@given(bucket_lists, batch_sizes, worlds, orders)
def test_carry_loses_and_repeats_nothing_over_epochs(buckets, batch_size, world, order) -> None:
    ranks = Ranks(buckets, batch_size, world, order=order, remainder="carry")
    seen: Counter = Counter()
    expected = [ranks.samplers[0].batches_per_epoch(epoch) for epoch in range(40)]
    taken = [0] * 40
    for _ in range(12):
        batches = ranks.round()
        state = ranks.state()
        if state["epoch"] >= 40:
            break
        taken[state["epoch"]] += 1
        assert all(len(batch) == batch_size and len({buckets[index] for index in batch}) == 1 for batch in batches)
        if state["cuts"][-1][2] == world:  # an epoch has begun: what came before it is seen or carried
            assert seen + Counter(state["carried"]) == Counter(
                {index: state["epoch"] for index in usable(buckets) if state["epoch"]}
            )
        seen.update(flat(batches))
    last = ranks.samplers[0].epoch
    assert taken[:last] == expected[:last]
    assert ranks.samplers[0].batches_per_epoch(last + 3) == expected[last + 3] if last + 3 < 40 else True


@thorough
@given(bucket_lists, batch_sizes, worlds, st.integers(0, 9))
def test_ranks_take_global_batches_in_turn(buckets, batch_size, world, seed) -> None:
    """A single process makes the batches that several share, in the same order; then the first ones fill the round."""
    alone = Ranks(buckets, batch_size, 1, seed=seed).rest_of_epoch()
    shared = Ranks(buckets, batch_size, world, seed=seed).rest_of_epoch()
    assert shared == (alone * world)[: len(shared)] and len(alone) <= len(shared) < len(alone) + world


@thorough
@given(
    bucket_lists, batch_sizes, worlds, st.sampled_from(["pad", "carry"]), st.sampled_from(["shuffled", "official"]),
    st.integers(0, 30),
)  # fmt: skip
def test_a_saved_position_goes_on_exactly(buckets, batch_size, world, remainder, order, stop) -> None:
    options = {"remainder": remainder, "order": order}
    try:
        unbroken = Ranks(buckets, batch_size, world, **options)
    except DataError as error:
        assert order == "official" and "An epoch has no batch" in str(error)
        return
    for _ in range(stop):
        unbroken.round()
    resumed = Ranks(buckets, batch_size, world, unbroken.state(), **options)
    assert resumed.state() == unbroken.state()
    assert resumed.samplers[0].epoch == unbroken.samplers[0].epoch
    for _ in range(8):
        assert resumed.round() == unbroken.round()


@thorough
@given(bucket_lists, st.lists(st.tuples(batch_sizes, worlds, st.integers(0, 6)), min_size=2, max_size=4), orders)
def test_other_sizes_neither_repeat_nor_lose_a_sample_of_the_epoch(buckets, runs, order) -> None:
    """pad: behind every switch, exactly what was not seen yet is cut into batches, with no more padding than needed."""
    state, seen = None, set()
    for number, (batch_size, world, stop) in enumerate(runs):
        ranks = Ranks(buckets, batch_size, world, state, order=order)
        unseen = usable(buckets) - seen
        left = ranks.samplers[0].batches_left
        assert left == padded_rounds(buckets, unseen, batch_size, world)
        rounds = left if number + 1 == len(runs) else min(stop, left)
        batches = [batch for _ in range(rounds) for batch in ranks.round()]
        fresh = [index for index in flat(batches) if index in unseen]
        full = sum(count // batch_size for count in Counter(buckets[index] for index in unseen).values())
        before_padding = flat(batches[:full])
        assert set(before_padding) <= unseen and len(set(before_padding)) == len(before_padding)
        assert ranks.samplers[0].epoch == 0
        seen |= set(fresh)
        state = ranks.state()
    assert seen == usable(buckets)


@thorough
@given(bucket_lists, st.lists(st.tuples(batch_sizes, worlds, st.integers(0, 6)), min_size=2, max_size=4), orders)
def test_carry_with_other_sizes_is_exact(buckets, runs, order) -> None:
    state, seen = None, Counter()
    for batch_size, world, stop in runs:
        ranks = Ranks(buckets, batch_size, world, state, order=order, remainder="carry")
        for _ in range(stop):
            seen.update(flat(ranks.round()))
        state = ranks.state()
    seen.update(flat(ranks.rest_of_epoch()))
    ranks.round()  # the first of a later epoch, whose state tells what was carried into it
    state = ranks.state()
    assert seen + Counter(state["carried"]) == Counter(dict.fromkeys(usable(buckets), state["epoch"]))


def test_official_order_of_another_world_goes_on_with_what_is_left() -> None:
    two = Ranks(["1.0"] * 12, 2, 2, order="official")
    assert two.round() == [[0, 1], [6, 7]]
    three = Ranks(["1.0"] * 12, 1, 3, two.state(), order="official")
    assert three.rest_of_epoch() == [[2], [4], [8], [3], [5], [9]]  # of 8 left, 3 ranks get 2 each
    assert three.round() == [[0], [4], [8]]


def test_official_ranks_end_together() -> None:
    ranks = Ranks(["1.0", "2.0", "1.0", "2.0", "1.0", "1.0", "1.0", "1.0"], 2, 2, order="official")
    assert ranks.rest_of_epoch() == [[0, 2], [4, 5], [1, 3], [6, 7]]
    ranks = Ranks(["1.0", "2.0", "1.0", "0.5", "1.0", "1.0", "1.0", "1.0"], 2, 2, order="official")
    assert ranks.rest_of_epoch() == [[0, 2], [4, 5]]


def test_epochs_and_seeds_differ_and_the_order_never_changes() -> None:
    def epochs(seed: int) -> list[list[int]]:
        sampler = AspectRatioBatchSampler(["1.0"] * 9, 9, seed=seed)
        return [next(sampler), next(sampler)]

    assert epochs(0) == epochs(0)
    assert len({tuple(batch) for seed in (0, 1, 2**80) for batch in epochs(seed)}) == 6
    # Saved positions of running trainings depend on this order.
    assert epochs(0) == [[3, 2, 1, 8, 6, 0, 7, 4, 5], [7, 4, 5, 1, 8, 6, 2, 0, 3]]


def test_batches_come_when_their_bucket_is_full() -> None:
    """Buckets mix over the epoch instead of one following the other."""
    buckets = ["1.0", "0.5"] * 400
    sampler = AspectRatioBatchSampler(buckets, 8, seed=3)
    kinds = [buckets[next(sampler)[0]] for _ in range(100)]
    assert 30 < sum(first != second for first, second in pairwise(kinds)) <= 99
    assert Counter(kinds) == {"1.0": 50, "0.5": 50}


def test_a_single_image_trains() -> None:
    assert next(AspectRatioBatchSampler([None, "1.0"], 4)) == [1, 1, 1, 1]
    carrying = AspectRatioBatchSampler([None, "1.0"], 4, remainder="carry")
    assert next(carrying) == [1, 1, 1, 1]
    assert carrying.epoch == 3 and carrying.len_epoch == 1


@pytest.mark.parametrize(
    "options", [{"remainder": "drop"}, {"order": "official"}, {"remainder": "drop", "world_size": 3}]
)
def test_an_epoch_without_a_batch_is_refused(options) -> None:
    with pytest.raises(DataError, match="smaller batch size, or remainder"):
        AspectRatioBatchSampler(["1.0", "1.0", "0.5", "0.5"], 3 if "world_size" not in options else 2, **options)


@pytest.mark.parametrize("buckets", [[], [None, None]])
@pytest.mark.parametrize("remainder", ["pad", "drop", "carry"])
def test_nothing_to_read_is_refused(buckets, remainder) -> None:
    with pytest.raises(DataError, match="can be used"):
        AspectRatioBatchSampler(buckets, 1, remainder=remainder)


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"seed": -1}, {"remainder": "keep"}, {"order": "random"}, {"rank": 2, "world_size": 2}]
)
def test_impossible_arguments(wrong) -> None:
    with pytest.raises(ValueError):
        AspectRatioBatchSampler(["1.0"], **{"batch_size": 1, **wrong})


def test_a_position_of_other_data_or_rules_is_refused() -> None:
    def make(buckets=("1.0", "0.5"), **options) -> AspectRatioBatchSampler:
        return AspectRatioBatchSampler(buckets, 2, **{"fingerprint": "a", **options})

    state = make().state_dict()
    make().load_state_dict(state)
    for other, word in (
        (make(fingerprint="b"), "keys or buckets"),
        (make(("1.0", "1.0")), "keys or buckets"),
        (make(("1.0", "0.5", "1.0")), "number of samples is 2, here it is 3"),
        (make(seed=1), "seed"),
        (make(order="sequential"), "order"),
        (make(remainder="carry"), "remainder"),
    ):
        with pytest.raises(DataError, match=word):
            other.load_state_dict(state)


@pytest.mark.parametrize(
    "damage",
    [{"cuts": []}, {"cuts": [[2, 1]]}, {"cuts": [[0, 1, 0]]}, {"cuts": [[2, 1, -1]]}, {"cuts": None}, {"epoch": -1},
     {"carried": [9]}, {"carried": [1]}, {"carried": ["x"]}, {"epoch": None}, {"carried": [2**80]}],
)  # fmt: skip
def test_a_damaged_position_is_refused(damage) -> None:
    sampler = AspectRatioBatchSampler(["1.0", None], 2)
    with pytest.raises(DataError, match="damaged"):
        sampler.load_state_dict({**sampler.state_dict(), **damage})


def test_the_state_is_small_and_safe_to_load() -> None:
    sampler = AspectRatioBatchSampler(BUCKETS * 1000, 7, remainder="carry", world_size=2)
    for _ in range(500):
        next(sampler)
    stored = io.BytesIO()
    torch.save(sampler.state_dict(), stored)
    stored.seek(0)
    state = torch.load(stored, weights_only=True)
    assert state == sampler.state_dict()
    assert len(state["carried"]) <= 3 * 6 + 7 and len(stored.getvalue()) < 5000
