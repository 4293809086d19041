"""The history of prompts, whatever the browser sends back."""

import pytest

from app import history
from app.wishes import MAX_PROMPT


def test_the_newest_stands_in_front_and_once() -> None:
    kept = history.add(history.add(history.add([], "a"), "b"), "a")
    assert kept == ["a", "b"]


def test_it_is_bounded() -> None:
    kept: list[str] = []
    for number in range(history.KEPT + 5):
        kept = history.add(kept, f"prompt {number}")
    assert len(kept) == history.KEPT and kept[0] == f"prompt {history.KEPT + 4}"


@pytest.mark.parametrize(
    "stored", [None, "text", 3, {"a": 1}, [None, 3, ["x"], {"y": 1}, " ", "x" * (MAX_PROMPT + 1)], [[]] * 10_000]
)
def test_nonsense_of_the_browser_is_left_out(stored: object) -> None:
    assert history.clean(stored) == []


def test_labels_are_short_lines() -> None:
    assert history.labels(["a\n  b", "x" * 500]) == ["a b", "x" * (history.SHOWN - 1) + "…"]
