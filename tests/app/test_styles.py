"""Styles: the repository's own, and what a file of styles may not be."""

import json
from pathlib import Path

import pytest

from app.styles import NO_STYLE, Style, StyleError, load_styles

OFFICIAL = [
    NO_STYLE, "Cinematic", "Photographic", "Anime", "Manga", "Digital Art", "Pixel art", "Fantasy art", "Neonpunk",
    "3D Model",
]  # fmt: skip


def test_the_repository_has_the_styles_people_know() -> None:
    styles = load_styles()
    assert list(styles) == OFFICIAL
    for name, style in styles.items():
        prompt, negative = style.apply("a {cat} of 100 %", "rain")
        assert "a {cat} of 100 %" in prompt and "{prompt}" not in prompt
        assert negative.startswith("rain") and (name == NO_STYLE) == (negative == "rain")


def test_no_style_changes_nothing() -> None:
    assert Style(NO_STYLE).apply(" a cat ", "") == ("a cat", "")


def test_a_file_holds_one_style_or_a_list(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text(json.dumps({"name": "B", "prompt": "{prompt}, b"}))
    (tmp_path / "a.json").write_text(json.dumps([{"name": "A", "prompt": "{prompt}, a", "negative_prompt": "x"}]))
    (tmp_path / "notes.txt").write_text("not read")
    styles = load_styles(tmp_path)
    assert list(styles) == [NO_STYLE, "A", "B"]
    assert styles["A"].apply("p", "") == ("p, a", "x")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "no valid JSON"),
        ("\udce9", "no valid JSON"),
        ("[" * 100_000, "no valid JSON"),
        ("[1]", "style 1 must be an object"),
        ('{"name": "A"}', "prompt must hold {prompt} once"),
        ('{"name": "A", "prompt": "{prompt} {prompt}"}', "once"),
        ('{"name": " ", "prompt": "{prompt}"}', "needs a name"),
        ('{"name": "A", "prompt": 3}', "prompt must be a text, not int"),
        ('{"name": "A", "prompt": "{prompt}", "negative": ""}', "unknown key 'negative'"),
        (
            '[{"name": "A", "prompt": "{prompt}"}, {"name": "A", "prompt": "{prompt}"}]',
            "2: the name 'A' is taken",
        ),
        (f'{{"name": "{NO_STYLE}", "prompt": "{{prompt}}"}}', "taken"),
    ],
)
def test_a_bad_file_is_one_sentence_with_its_name(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "mine.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(StyleError) as error:
        load_styles(tmp_path)
    assert says in str(error.value) and "mine.json" in str(error.value) and "\n" not in str(error.value)


def test_a_folder_among_the_files_is_said(tmp_path: Path) -> None:
    (tmp_path / "mine.json").mkdir()
    with pytest.raises(StyleError, match="mine.json cannot be read"):
        load_styles(tmp_path)
