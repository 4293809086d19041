"""Cutting an epoch into batches, against the same rule written as a loop over samples."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sana.data.epoch_plan import EpochPlan, encode_buckets, permutation

code_lists = st.lists(st.integers(-1, 3), max_size=40)


def loop(places: list[int], codes: list[int], batch_size: int, tails: bool, by_bucket: bool) -> list[list[int]]:
    """A sample joins its bucket; a full bucket is a batch."""
    buckets: dict[int, list[int]] = {}
    batches = []
    for place in places:
        if codes[place] < 0:
            continue
        bucket = buckets.setdefault(codes[place], [])
        bucket.append(place)
        if len(bucket) == batch_size:
            batches.append(buckets.pop(codes[place]))
    short = sorted(buckets.items()) if by_bucket else sorted(buckets.items(), key=lambda item: item[1][-1])
    return batches + [bucket for _, bucket in short] if tails else batches


@settings(max_examples=100, deadline=None)
@given(code_lists, st.integers(1, 6), st.integers(1, 3), st.booleans(), st.booleans(), st.data())
def test_plan_is_the_loop(codes, batch_size, lanes, tails, by_bucket, data) -> None:
    places = [place for place in range(len(codes)) if data.draw(st.booleans())]
    plan = EpochPlan(
        np.array(places, int), np.array(codes, np.int16), batch_size, lanes=lanes, tails=tails, by_bucket=by_bucket
    )
    share = len(places) // lanes
    parts = [loop(places[i * share : (i + 1) * share], codes, batch_size, tails, by_bucket) for i in range(lanes)]
    turns = [list(turn) for turn in zip(*parts, strict=False)]
    expected = [batch for turn in turns for batch in turn]
    assert [plan.batch(number).tolist() for number in range(len(plan))] == expected
    for handed_out in range(len(plan) + 3):
        gone = {place for batch in expected[:handed_out] for place in batch}
        assert plan.left(handed_out).tolist() == [place for place in places if place not in gone]


def test_buckets_are_numbered_by_ratio() -> None:
    codes, digest = encode_buckets(["4.0", "0.25", None, "10.0", "4.0", "other"])
    assert codes.tolist() == [1, 0, -1, 2, 1, 3]
    others = (["4.0", "0.25", None, "10.0", "4.0", "another"], ["4.0", "0.25", "0.25", "10.0", "4.0", "other"])
    assert digest not in [encode_buckets(other)[1] for other in others]


def test_permutations_are_fair_and_complete() -> None:
    drawn = np.stack([permutation(6, seed=1, epoch=epoch) for epoch in range(3000)])
    assert (np.sort(drawn, axis=1) == np.arange(6)).all()
    for place in range(6):  # every number stands at every place about equally often: 500 +- 5 sigma
        assert (abs(np.bincount(drawn[:, place], minlength=6) - 500) < 5 * (3000 * 5 / 36) ** 0.5).all()
    assert permutation(0, 0, 0).tolist() == [] and permutation(1, 0, 0).tolist() == [0]
