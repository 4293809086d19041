"""YAML 1.2 scalars, duplicate keys, and the two spellings of an override."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sana.config_checks import ConfigError
from sana.config_yaml import parse_yaml, split_overrides


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.0e-10", 1e-10),
        ("-2E+3", -2000.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("1_000", 1000),
        ("0", 0),
        ("007", "007"),
        ("1:30", "1:30"),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("hf://owner/repo/a.pth", "hf://owner/repo/a.pth"),
        ("[1e-30, 1e-16, a]", [1e-30, 1e-16, "a"]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
        ("雪山 🌸", "雪山 🌸"),
        (".inf", math.inf),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    parsed = parse_yaml(text, "text")
    assert parsed == value
    assert type(parsed) is type(value)


def test_merge_keys_and_anchors() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n"
    assert parse_yaml(text, "text")["b"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    "text",
    ["a: 1\na: 2", "{a: {b: 1, b: 2}}", "[", "!!python/object/apply:os.getcwd []", "\x00", "{[1]: 2}", "[" * 9999],
)
def test_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="^text: not valid YAML"):
        parse_yaml(text, "text")


@given(st.text(alphabet="ab01-.:,#&*!|>'\"{}[]<\n ~eE", max_size=40))
@settings(deadline=None)
def test_any_text_is_read_or_refused_in_one_sentence(text: str) -> None:
    try:
        parse_yaml(text, "text")
    except ConfigError as error:
        assert "\n" not in str(error)


def test_split_overrides() -> None:
    assert split_overrides(["--a.b=1", "--c", "2", "--d", "--e=", "--f=x=y"]) == [
        ("a.b", "1"),
        ("c", "2"),
        ("d", "true"),
        ("e", ""),
        ("f", "x=y"),
    ]


@pytest.mark.parametrize("items", [["a=1"], ["--a=1", "2"], ["--"]])
def test_split_refuses_strays(items: list[str]) -> None:
    with pytest.raises(ConfigError, match="--section.key=value"):
        split_overrides(items)
