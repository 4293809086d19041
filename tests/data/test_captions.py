"""Choosing captions by score, against the formula, against counted draws, and at its edges."""

import json
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sana.data.captions import (
    caption_of_text,
    caption_probabilities,
    captions_of_json,
    choose_caption,
    read_json,
    scores_of_json,
)
from sana.data.sample import BrokenSampleError

CAPTIONS = {"prompt": "own", "A": "first", "B": "second"}
scores = st.lists(st.tuples(st.sampled_from("ABCD"), st.floats(0, 1e6)), max_size=6)


def test_half_the_temperature_squares_the_odds() -> None:
    names, probabilities = caption_probabilities([("A", 10.0), ("B", 30.0), ("C", 5.0)], clip_thr=10.0,
                                                 clip_thr_temperature=0.5)  # fmt: skip
    assert names == ["A", "B"]
    assert probabilities == pytest.approx([0.1, 0.9])


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 0.01])
def test_a_temperature_of_zero_means_a_hundredth(temperature: float) -> None:
    _, probabilities = caption_probabilities([("A", 30.0), ("B", 30.3)], clip_thr_temperature=temperature)
    assert probabilities[1] / probabilities[0] == pytest.approx(1.01**100)


@settings(deadline=None)
@given(scores, st.floats(-10, 1e6), st.floats(0, 10))
def test_they_are_probabilities(given_scores: list[tuple[str, float]], threshold: float, temperature: float) -> None:
    names, probabilities = caption_probabilities(given_scores, clip_thr=threshold, clip_thr_temperature=temperature)
    assert len(names) == len(probabilities)
    assert not names or sum(probabilities) == pytest.approx(1)
    assert all(0 <= probability <= 1 for probability in probabilities)


def test_huge_scores_and_low_temperatures_do_not_overflow() -> None:
    _, probabilities = caption_probabilities([("A", 1e9), ("B", 1e9)], clip_thr_temperature=0.0)
    assert probabilities == [0.5, 0.5]


def test_draws_follow_the_probabilities() -> None:
    rng = random.Random(0)
    drawn = Counter(choose_caption(CAPTIONS, [("A", 10.0), ("prompt", 30.0)], rng)[0] for _ in range(4000))
    assert set(drawn) == {"A", "prompt"}
    assert abs(drawn["A"] / 4000 - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5  # four standard deviations


def test_the_draw_is_one_random_choices() -> None:
    for seed in range(20):
        expected = random.Random(seed).choices(["A", "prompt", "B"], weights=[20.5, 25.0, 10.0])[0]
        pairs = [("A", 20.5), ("prompt", 25.0), ("B", 10.0)]
        assert choose_caption(CAPTIONS, pairs, random.Random(seed))[0] == expected


@pytest.mark.parametrize(
    ("pairs", "threshold", "expected"),
    [
        ([("A", 20.0), ("B", 24.9)], 25.0, ("B", 24.9)),  # none passes: the best
        ([("A", 20.0), ("B", 20.0)], 25.0, ("A", 20.0)),  # the first of the best
        ([("missing", 90.0), ("A", 1.0)], 5.0, ("A", 1.0)),  # scores of captions that are not there
        ([("missing", 90.0)], 0.0, ("prompt", None)),
        ([("A", float("nan")), ("B", float("inf"))], 0.0, ("prompt", None)),
        ([("A", -3.0), ("B", -2.0)], -5.0, ("B", -2.0)),  # no odds from negative scores
        ([("A", 0.0)], 0.0, ("A", 0.0)),
        ([], 0.0, ("prompt", None)),
    ],
)
def test_without_a_choice_nothing_is_drawn(pairs, threshold: float, expected) -> None:
    rng = random.Random(1)
    before = rng.getstate()
    assert choose_caption(CAPTIONS, pairs, rng, clip_thr=threshold) == expected
    assert rng.getstate() == before


def test_without_a_prompt_the_first_caption_stands_in() -> None:
    assert choose_caption({"B": "second", "A": "first"}, [], random.Random(0)) == ("B", None)


@pytest.mark.parametrize(
    ("text", "first", "everything"),
    [
        ("a cat\n", "a cat", "a cat"),
        ("\ufeff  a cat \r\n a dog\r\n\r\n", "a cat", "a cat\na dog"),
        ("\n\n a cat", "a cat", "a cat"),
        ("old\rmac", "old", "old\nmac"),
        (" \n\t\n", "", ""),
        ("", "", ""),
    ],
)
def test_lines_of_a_text(text: str, first: str, everything: str) -> None:
    assert caption_of_text(text) == first
    assert caption_of_text(text, "all") == everything


def test_an_unknown_choice_of_lines_is_refused() -> None:
    with pytest.raises(ValueError, match="caption_lines is 'last'; choose one of first, all"):
        caption_of_text("a", "last")


def test_entries_of_other_images_do_not_count() -> None:
    content = {"1": {"A": "text", "B": " ", "C": None}, "2": {"A": "other"}}
    assert captions_of_json(content, "1") == {"A": "text"}
    assert scores_of_json({"1": {"A": "20.5", "B": 3}, "2": {}}, "1") == [("A", 20.5), ("B", 3.0)]
    for strange in (None, [], {"file_name": "1.png", "prompt": "a"}):
        assert captions_of_json(strange, "1") == {}
        assert scores_of_json(strange, "1") == []


@pytest.mark.parametrize("entry", ["text", 3, ["a"]])
def test_an_entry_of_another_form_is_an_error(entry) -> None:
    with pytest.raises(ValueError, match="the entry of '1'"):
        captions_of_json({"1": entry}, "1")


def test_values_of_another_type_are_errors() -> None:
    with pytest.raises(ValueError, match="the caption 'A' of '1' is 3, not a text"):
        captions_of_json({"1": {"A": 3}}, "1")
    for value in ("high", None, [1]):
        with pytest.raises(ValueError, match="the score of 'A' for '1' is .*, not a number"):
            scores_of_json({"1": {"A": value}}, "1")


def test_json_files(tmp_path) -> None:
    path = tmp_path / "a.json"
    assert read_json(path, "a.png") is None
    path.write_text(json.dumps({"a": {}}))
    assert read_json(path, "a.png") == {"a": {}}
    for damaged in (b'{"a": ', b"\xff\xfe\x00", b"[" * 100_000):
        path.write_bytes(damaged)
        with pytest.raises(BrokenSampleError, match=r"a\.png: .*a\.json is not readable JSON"):
            read_json(path, "a.png")
