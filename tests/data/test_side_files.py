"""Entries read by position are those of the json module."""

import json

import pytest

from sana.data.sample import BrokenSampleError, DataError
from sana.data.side_files import SideFile

CONTENT = {
    "a": {"VILA": "plain", "n": 1.5},
    "é/ü": {"VILA": 'ümläut "quoted" \\ 日本 {"a": {}} '},
    "esc\n\u2028": {},
    "last": {"nested": {"a": [1, 2, {"b": None}]}},
}


@pytest.mark.parametrize("options", [{}, {"indent": 3}, {"ensure_ascii": False}, {"separators": (",", ":")}])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf", b" \n"])
def test_entries_are_those_of_json(tmp_path, options, mark):
    path = tmp_path / "side.json"
    path.write_bytes(mark + json.dumps(CONTENT, **options).encode() + b"\n")
    keys = ["missing", *reversed(CONTENT)]
    side = SideFile(path, keys)
    assert [side.entry(position, key) for position, key in enumerate(keys)] == [CONTENT.get(key, {}) for key in keys]


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a": 1', '{"a" 1}', '{"a": 1} {"b": 2}', '{"a": 1,}', "{1: 2}", "null"]
)
def test_what_json_refuses_is_refused(tmp_path, text):
    path = tmp_path / "side.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"side.json is not a readable JSON mapping"):
        SideFile(path, ["a"])


def test_an_empty_mapping_has_no_entries(tmp_path):
    path = tmp_path / "side.json"
    path.write_text(" {} ")
    assert SideFile(path, ["a"]).entry(0, "a") == {}


def test_a_file_that_changes_is_a_broken_sample(tmp_path):
    path = tmp_path / "side.json"
    path.write_text('{"a": {"VILA": "x"}}')
    side = SideFile(path, ["a"])
    path.write_text("{}")
    with pytest.raises(BrokenSampleError, match="side.json has changed"):
        side.entry(0, "a")
