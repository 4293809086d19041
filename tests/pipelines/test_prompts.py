"""Prompt files, suffixes and names: what is read is what was written, and every fault is named with its place."""

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sana.pipelines.prompts import ParsedPrompt, PromptFileError, PromptItem, parse_suffixes, read_prompts, safe_name

ROOT = Path(__file__).parents[2]
SCRIPTS = ["雪山日出，湖面倒影", "👩‍👩‍👧‍👦 at the 🏖️", "кот и قطة и 猫", 'a "neon" sign: Sana/1', "e\u0301te\u0301"]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def test_a_text_file_is_one_prompt_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "\ufeffa cat\r\n\n  a dog  \n" + "\n".join(SCRIPTS))
    items = read_prompts(path)
    assert [item.prompt for item in items] == ["a cat", "a dog", *SCRIPTS]
    assert [item.id for item in items[:3]] == ["1", "3", "4"]


def test_a_json_file_keeps_ids_and_fields(tmp_path: Path) -> None:
    content = {
        "猫": {"prompt": SCRIPTS[1], "negative_prompt": "blurry", "seed": 7, "height": 512, "width": 1024},
        "plain": {"prompt": "a dog"},
    }
    items = read_prompts(write(tmp_path, "p.json", json.dumps(content, ensure_ascii=False)))
    assert items == [
        PromptItem("猫", SCRIPTS[1], "blurry", 7, 512, 1024),
        PromptItem("plain", "a dog"),
    ]


@pytest.mark.parametrize("name", ["samples_mini.txt", "samples_mini.json"])
def test_the_shipped_files_are_read(name: str) -> None:
    items = read_prompts(ROOT / "asset" / name)
    assert len(items) >= 10 and all(item.prompt for item in items)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "", "is empty"),
        ("p.txt", " \n\r\n", "is empty"),
        ("p.json", "", "is empty"),
        ("p.txt", b"a cat\na \xff dog", "line 2: this is not UTF-8"),
        ("p.txt", "a cat\na dog --ar 1x2", r"line 2: --ar needs height:width"),
        ("p.json", '{"a": {"prompt": "x"},\n  "b": {"prompt": }}', "line 2, column 19: this is not JSON"),
        ("p.json", '{"a": {"prompt": "x"}', "line 1, column 22"),
        ("p.json", "[]", "must hold an object"),
        ("p.json", "{}", "must hold an object"),
        ("p.json", '{"a": "x"}', "entry 'a': expected an object"),
        ("p.json", '{"a": {"seed": 1}}', "entry 'a': expected an object with the field"),
        ("p.json", '{"a": {"prompt": null}}', "prompt must be a text"),
        ("p.json", '{"a": {"prompt": "\\ud83d"}}', "prompt must be a text"),
        ("p.json", '{"a": {"prompt": "x", "seed": -1}}', "seed must be"),
        ("p.json", '{"a": {"prompt": "x", "seed": 1.5}}', "seed must be"),
        ("p.json", '{"a": {"prompt": "x", "seed": true}}', "seed must be"),
        ("p.json", '{"a": {"prompt": "x", "height": 0}}', "height must be a positive number"),
        ("p.json", '{"a": {"prompt": "x", "width": 1000000000}}', "width must be"),
        ("p.json", '{"a": {"prompt": "x", "width": NaN}}', "NaN is no number"),
        ("p.json", '{"a": {"prompt": "x"}, "a": {"prompt": "y"}}', "'a' stands twice"),
        ("p.json", '{"a": {"prompt": "x --hw 8:8", "height": 64}}', "given twice"),
        ("p.json", "[" * 100_000, "recursion"),
    ],
)
def test_a_fault_is_named_with_its_place(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(PromptFileError, match=message) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptFileError, match="does not exist"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(PromptFileError, match="is a folder"):
        read_prompts(tmp_path)


def test_a_misspelt_field_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_prompts(write(tmp_path, "p.json", '{"a": {"prompt": "x", "hieght": 8}}'))
    assert "'hieght' has no effect. Did you mean 'height'?" in caplog.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat --ar 1:2", ParsedPrompt("a cat ", 0.5)),
        ("a cat --aspect_ratio 16:9 --ar 1:1", ParsedPrompt("a cat ", 16 / 9)),
        ("a cat --hw 512:1024", ParsedPrompt("a cat ", None, 512, 1024)),
        ("a cat --ar=3:2 --hw=8:16", ParsedPrompt("a cat ", 1.5, 8, 16)),
        ("an --arch of stone", ParsedPrompt("an --arch of stone")),
        ("an --ar-like thing", ParsedPrompt("an --ar-like thing")),
    ],
)
def test_suffixes(text: str, expected: ParsedPrompt) -> None:
    assert parse_suffixes(text) == expected


@pytest.mark.parametrize(
    "text", ["x --ar", "x --ar 1:0", "x --ar 0:1", "x --ar 1:2:3", "x --hw 1.5:2", "x --hw -8:8", f"x --hw {'9' * 9}:1"]
)
def test_a_suffix_without_a_usable_value_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="needs height:width"):
        parse_suffixes(text)


def test_the_size_of_an_item() -> None:
    assert PromptItem("1", "x").size(1024) == (1024, 1024)
    assert PromptItem("1", "x", height=512, width=768).size(1024) == (512, 768)
    assert PromptItem("1", "x", aspect_ratio=0.5).size(1024) == (704, 1408)
    assert PromptItem("1", "x", aspect_ratio=2.0).size(512) == (704, 352)
    assert PromptItem("1", "x", aspect_ratio=2.0, height=64, width=32).size(512) == (64, 32)
    with pytest.raises(ValueError, match="--ar cannot take effect"):
        PromptItem("1", "x", aspect_ratio=2.0).size(300)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=200), max_size=6))
def test_names_are_safe_and_unique(prompts: list[str]) -> None:
    taken: set[str] = set()
    names = [safe_name(prompt, taken) for prompt in prompts]
    folded = [unicodedata.normalize("NFC", name.casefold()) for name in names]
    assert len(set(folded)) == len(names)
    for name in names:
        assert 0 < len(name.encode("utf-8")) <= 126
        assert not set(name) & set('<>:"/\\|?*\0\n\r\t') and name not in (".", "..")
        assert name[0] not in "-. " and name[-1] not in ". "


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a red circle", "a red circle"),
        ("雪山日出，湖面倒影", "雪山日出，湖面倒影"),
        ("🌸🚀🌈", "🌸🚀🌈"),
        ("../../etc/passwd", "etc passwd"),
        ("--help", "help"),
        ("", "empty prompt"),
        ("con.txt", "con.txt_"),
        ("a\x00b\nc", "a b c"),
    ],
)
def test_names_say_the_prompt(prompt: str, name: str) -> None:
    assert safe_name(prompt, set()) == name


def test_equal_prefixes_do_not_collide_and_long_names_do_not_depend_on_the_list() -> None:
    one, two = "a cat " * 40 + "sleeps", "a cat " * 40 + "runs"
    alone = safe_name(two, set())
    taken: set[str] = set()
    assert safe_name(one, taken) != (second := safe_name(two, taken))
    assert second == alone
    assert [safe_name(text, taken) for text in ("A dog", "a dog", "a dog")] == ["A dog", "a dog-2", "a dog-3"]


def test_a_joined_emoji_is_not_cut_in_two(tmp_path: Path) -> None:
    family = "👩‍👩‍👧‍👦"
    for offset in range(30):
        name = safe_name("x" * (80 + offset) + family * 9, set())
        stem = name.rpartition("-")[0].lstrip("x")
        assert stem == family * (len(stem) // len(family)), stem
        (tmp_path / f"{name}.png").touch()
