"""What parsers share; the words that parsers repeat, so that help imports no torch, are those of the code."""

import argparse

import pytest

from sana.commands import parsing


def test_overrides_are_kept_apart():
    parser = parsing.only_given("x", None)
    parser.add_argument("--seed", type=int)
    given = parsing.parse_with_overrides(parser, ["--seed=3", "--model.qk_norm=true", "--train.optimizer.lr=1e-4"])
    assert given == ({"seed": 3}, ["--model.qk_norm=true", "--train.optimizer.lr=1e-4"])


@pytest.mark.parametrize("stranger", ["--sede=3", "word", "--model.qk_norm", "--.x=1"])
def test_other_words_are_refused(stranger, capsys):
    with pytest.raises(SystemExit, match="2"):
        parsing.parse_with_overrides(parsing.only_given("x", None), [stranger])
    assert f"unknown argument {stranger}" in capsys.readouterr().err


def test_readers():
    assert [parsing.truth(text) for text in ("TRUE", "no", "1")] == [True, False, True]
    assert parsing.numbers("[0.5, 2]") == [0.5, 2.0]
    assert parsing.or_word(int, "auto")("7") == 7 and parsing.or_word(int, "auto")("auto") == "auto"
    for reader, text in ((parsing.truth, "maybe"), (parsing.numbers, "[a]"), (parsing.or_word(int, "auto"), "x")):
        with pytest.raises(argparse.ArgumentTypeError):
            reader(text)


def test_repeated_words_are_those_of_the_code():
    from sana.commands import to_diffusers
    from sana.models import diffusers_config
    from sana.models.quantization.schemes import SCHEMES

    assert tuple(SCHEMES) == parsing.SCHEMES
    assert to_diffusers.MODEL_TYPES == diffusers_config.MODEL_TYPES
    assert to_diffusers.SCHEDULERS == diffusers_config.SCHEDULERS
