"""The table of a plan: units, alignment, the stage that decides, and nothing that is not there."""

import pytest

from sana.pipelines.plan_report import Reason, Sheet, columns, render
from sana.pipelines.plan_stages import Stage

STAGES = (
    Stage("first", {"text_encoder": 5_000_000_000, "transformer": 1_500_000_000}, 20_000_000),
    Stage("second", {"transformer": 1_500_000_000}, 12_345_678_901),
)


def sheet(**changes: object) -> Sheet:
    usual: dict[str, object] = {
        "headline": "a model: one picture", "stages": STAGES, "limit": None, "host": 0,
        "reasons": (Reason("offload", "model", "otherwise it does not fit"), Reason("batch", "1", "as asked for")),
        "notes": (),
    }  # fmt: skip
    return Sheet(**(usual | changes))  # type: ignore[arg-type]


def test_the_whole_text():
    shown = render(sheet(limit=16_000_000_000, host=6_500_000_000, notes=("not all is counted",)))
    assert shown.splitlines() == [
        "a model: one picture",
        "",
        "GB             first    second",
        "text encoder    5.00         -",
        "transformer     1.50      1.50",
        "above these     0.02     12.35",
        "total           6.52     13.85",
        "                       decides",
        "",
        "needed   13.85 GB, in second",
        "allowed  16.00 GB; 2.15 GB stay free",
        "host     6.50 GB of weights wait in the machine's memory",
        "",
        "setting   value   why",
        "offload   model   otherwise it does not fit",
        "batch     1       as asked for",
        "",
        "note: not all is counted",
    ]
    assert str(sheet()) == render(sheet())


def test_small_amounts_are_shown_in_megabytes():
    shown = render(sheet(stages=(Stage("only", {"transformer": 21_188_480}, 4_186_640),)))
    assert "MB               only" in shown
    assert "total            25.4" in shown


def test_what_is_not_there_is_not_shown():
    shown = render(sheet())
    assert "allowed" not in shown
    assert "host" not in shown
    assert "note" not in shown


def test_of_equal_stages_the_first_decides():
    equal = sheet(stages=(Stage("a", {}, 7), Stage("b", {"x": 7}, 0)))
    assert (equal.decisive.name, equal.peak) == ("a", 7)


def test_plain_values_are_bytes():
    values = sheet(limit=16_000_000_000).as_dict()
    assert values["stages"][1] == {
        "name": "second", "held": {"transformer": 1_500_000_000}, "resident": 1_500_000_000,
        "peak": 12_345_678_901, "total": 13_845_678_901,
    }  # fmt: skip
    assert (values["needed"], values["allowed"], values["decisive"]) == (13_845_678_901, 16_000_000_000, "second")
    assert values["settings"][1] == {"setting": "batch", "value": "1", "why": "as asked for"}


@pytest.mark.parametrize(
    ("right", "lines"),
    [(False, ["a    bbb   c", "dd   e     ffff"]), (True, ["a    bbb      c", "dd     e   ffff"])],
)
def test_columns(right: bool, lines: list[str]):
    assert columns([("a", "bbb", "c"), ("dd", "e", "ffff")], right=right) == lines
