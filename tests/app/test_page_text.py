"""What the page says: escaped, and right in number and tense."""

from dataclasses import replace

import pytest

from app import page_text
from app.generation import CHECKING, DECODING, DRAWING, LOADING, WAITING, Job, Progress
from app.wishes import Wish
from tests.app.test_pictures import RECIPE

HOSTILE = "<script>alert(1)</script>\"'&"


def test_texts_from_outside_are_escaped() -> None:
    card = page_text.recipe_card(replace(RECIPE, prompt=HOSTILE, negative_prompt=HOSTILE, sampler=HOSTILE))
    for text in (card, page_text.message(HOSTILE), page_text.note(HOSTILE), page_text.heading(HOSTILE, HOSTILE)):
        assert "<script" not in text and "&lt;script&gt;" in text


def test_a_card_shows_all_that_decides() -> None:
    card = page_text.recipe_card(replace(RECIPE, prompt="a cat"))
    for text in ("a cat", "<dd>7</dd>", "8 × 8", "<dd>2</dd>", "flow_euler", "<dd>4.5</dd>", "<dd>off</dd>", "fp32"):
        assert text in card
    assert "Negative" not in page_text.recipe_card(replace(RECIPE, negative_prompt="")).split("<details")[0]


def test_no_error_is_no_element() -> None:
    assert page_text.message(None) == page_text.message("") == ""


@pytest.mark.parametrize(
    ("progress", "says"),
    [
        (Progress(WAITING, place=2, pictures=1, picture=1, steps=4), "Waiting: number 2 in the queue"),
        (Progress(CHECKING, pictures=1, picture=1, steps=4), "Checking the prompt"),
        (Progress(LOADING, pictures=1, picture=1, steps=4), "Preparing the model"),
        (Progress(DRAWING, pictures=1, picture=1, step=3, steps=4), "Step 3 of 4"),
        (
            Progress(DRAWING, pictures=3, picture=2, step=3, steps=4, elapsed=2, remaining=65),
            "Picture 2 of 3 · step 3 of 4",
        ),
        (
            Progress(DRAWING, pictures=3, picture=2, step=3, steps=4, elapsed=2, remaining=65),
            "2.0 s · about 1 min 05 s left",
        ),
        (Progress(DECODING, pictures=1, picture=1, step=4, steps=4), "painting the pixels"),
    ],
)
def test_the_status_says_where_it_is(progress: Progress, says: str) -> None:
    assert says in page_text.status(progress)


def test_the_bar_is_as_long_as_the_share_that_is_done() -> None:
    for share in (0.0, 0.25, 1.0):
        text = page_text.status(Progress(DRAWING, pictures=2, picture=1, steps=4, share=share))
        assert f"width:{100 * share:.1f}%" in text and f'aria-valuenow="{100 * share:.0f}"' in text
    assert "width:" not in page_text.status(Progress(LOADING, pictures=2, picture=1, steps=4))


def test_how_it_ended() -> None:
    wish = Wish("a", 64, 64, 4, 4.5, 1.0, 0, number=3)
    job = Job(wish)
    job.cancelled = True
    assert "Cancelled after 0.0 s; no picture was finished." in page_text.outcome(job)
    job.pictures = [object(), object()]  # type: ignore[list-item]
    assert "2 of 3 pictures kept" in page_text.outcome(job)
    assert "2 pictures in" in page_text.outcome(replace(job, cancelled=False))
    assert "Stopped; 2 of 3 pictures kept" in page_text.outcome(replace(job, cancelled=False, error="Why."))


def test_times_in_words() -> None:
    assert [page_text.seconds(time) for time in (0.04, 9.94, 9.96, 59.4, 59.6, 3600)] == [
        "0.0 s", "9.9 s", "10 s", "59 s", "1 min 00 s", "60 min 00 s",
    ]  # fmt: skip
