"""Which files of a folder count as captioned images, by folders and by meta_data.json, and what is left out."""

import json
import logging
from pathlib import Path

import pytest

from sana.data.image_records import find_records
from sana.data.sample import DataError


def add(folder: Path, name: str, caption: str | None = "a caption") -> None:
    """Makes a file with the name of an image, which nobody opens, and, unless None, its caption."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def keys(folder: Path) -> list[str]:
    return [record.key for record in find_records([folder])]


def test_folders_below_and_any_spelling_of_the_ending_count(tmp_path) -> None:
    for name in ("b.PNG", "a.jpg", "deep/down/c.JPeG", "deep/d.webp", "A.Jpeg"):
        add(tmp_path, name)
    add(tmp_path, ".hidden.png")
    add(tmp_path, ".folder/e.png")
    (tmp_path / "deep" / "d.txt").rename(tmp_path / "deep" / "d.TXT")
    add(tmp_path, "e.bmp")
    assert keys(tmp_path) == ["A.Jpeg", "a.jpg", "b.PNG", "deep/d.webp", "deep/down/c.JPeG"]


def test_linked_folders_are_followed_once(tmp_path) -> None:
    add(tmp_path / "elsewhere", "a.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "elsewhere")
    assert keys(tmp_path / "data") == ["link/a.png"]


@pytest.mark.parametrize(
    "content",
    [
        {"name": "n", "__kind__": "Sana-ImgDataset", "img_names": ["b.png", "sub/a.png"]},
        ["b.png", "sub/a.png", "b.png"],
        [{"img": "b.png"}, {"file_name": "sub/a.png", "width": 3}],
        {"img_names": [{"path": "./b.png"}, {"path": "sub/a.png", "prompt": None}]},
        {"b.png": {"width": 3}, "sub/a.png": None},
    ],
)
def test_meta_data_decides_what_there_is_and_in_which_order(tmp_path, content) -> None:
    for name in ("sub/a.png", "b.png", "not_listed.png"):
        add(tmp_path, name, f"text of {name}")
    (tmp_path / "meta_data.json").write_text(json.dumps(content))
    assert keys(tmp_path) == ["b.png", "sub/a.png"]
    assert {record.text_suffix for record in find_records([tmp_path])} == {".txt"}


@pytest.mark.parametrize("content", [[{"file_name": "a.png", "prompt": " listed \n"}], {"a.png": "listed"}])
def test_meta_data_may_hold_the_caption(tmp_path, content) -> None:
    add(tmp_path, "a.png", "text")
    (tmp_path / "meta_data.json").write_text(json.dumps(content))
    assert find_records([tmp_path])[0].prompt == "listed"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable JSON"),
        ('[{"width": 3}]', "names no image; it needs one of img, file_name, path"),
        ('[{"img": 3}]', "names no image"),
        ('{"img_names": 3}', "3 names no image"),
        ('[{"img": "a.png", "prompt": 3}]', "the prompt of 'a.png' is 3"),
        ('["../a.png"]', "outside the folder"),
        ('["/etc/a.png"]', "outside the folder"),
        ('["missing.png"]', "1 captions without an image"),
    ],
)
def test_bad_meta_data_stops(tmp_path, content: str, message: str) -> None:
    add(tmp_path, "a.png")
    (tmp_path / "meta_data.json").write_text(content)
    with pytest.raises(DataError, match=message):
        find_records([tmp_path])


def test_what_lacks_its_half_is_left_out_with_one_line_each(tmp_path, caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("sana"), "propagate", True)  # setup_logging switches it off
    add(tmp_path, "good.png")
    for number in range(7):
        add(tmp_path, f"bare{number}.png", None)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "alone.txt").write_text("text")
    with caplog.at_level(logging.WARNING, "sana"):
        assert keys(tmp_path) == ["good.png"]
    assert [record.getMessage() for record in caplog.records] == [
        "7 images have no caption and are left out: bare0.png, bare1.png, bare2.png, bare3.png, bare4.png, ...",
        "1 captions have no image and are left out: sub/alone.txt",
    ]


def test_nothing_to_train_on_is_an_error_that_says_what_to_do(tmp_path) -> None:
    with pytest.raises(DataError, match=r"No captioned image in .*put name\.txt beside"):
        find_records([tmp_path])
    add(tmp_path, "a.png", None)
    with pytest.raises(DataError, match="1 images without a caption, 0 captions without an image"):
        find_records([str(tmp_path)])
    with pytest.raises(DataError, match="nowhere does not exist"):
        find_records([str(tmp_path / "nowhere")])
    with pytest.raises(DataError, match=r"a\.png is not a folder"):
        find_records([tmp_path / "a.png"])
    with pytest.raises(DataError, match="data_dir, which is empty"):
        find_records([])


def test_records_keep_what_is_known_without_reading(tmp_path) -> None:
    add(tmp_path, "sub/a.b.png")
    (record,) = find_records([tmp_path])
    assert (record.key, record.name, record.stem + record.text_suffix) == (
        "sub/a.b.png",
        "a.b",
        str(tmp_path / "sub/a.b.txt"),
    )
