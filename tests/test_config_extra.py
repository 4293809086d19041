"""Our own options under `data.extra` and `train.extra`: defaults, types, mistyped keys."""

import pytest

from sana.config import ConfigError
from sana.config_extra import DataExtra, TrainExtra, data_extra, train_extra


def test_nothing_given_is_the_defaults():
    assert data_extra(None) == data_extra({}) == DataExtra()
    assert train_extra(None) == TrainExtra()


def test_values_are_taken():
    assert data_extra({"remainder": "carry", "max_pixels": 100}).remainder == "carry"
    assert train_extra({"keep_last": 7, "null_caption_probability": 1}).keep_last == 7


@pytest.mark.parametrize(
    ("check", "raw", "sentence"),
    [
        (data_extra, {"remaindr": "pad"}, "Did you mean 'remainder'"),
        (data_extra, {"remainder": "keep"}, "pad, drop, carry"),
        (data_extra, {"order": "random"}, "shuffled"),
        (data_extra, {"broken_budget": "many"}, "wrong type"),
        (data_extra, {"max_pixels": 0}, "positive"),
        (data_extra, {"resize": "quick"}, "exact, fast"),
        (train_extra, {"kernels": "cuda"}, "auto, triton"),
        (data_extra, ["pad"], "mapping"),
        (train_extra, {"keep_lst": 3}, "Did you mean 'keep_last'"),
        (train_extra, {"keep_last": 0}, "at least 1"),
        (train_extra, {"max_steps": -1}, "negative"),
        (train_extra, {"null_caption_probability": 1.5}, r"\[0, 1\]"),
        (train_extra, {"async_save": 1}, "wrong type"),
    ],
)
def test_what_is_wrong_is_named(check, raw, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check(raw)
