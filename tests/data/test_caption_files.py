"""Side files are filled where entries are missing, whole or not at all, in the form that the data sets read."""

import json
from pathlib import Path

import pytest

from sana.data.caption_files import fill_side_files
from sana.data.sample import DataError
from sana.data.scan import scan
from tests.data.test_check import good_files, picture, write, write_tar


def describe(images, texts):
    """Describes an image by its size."""
    return [
        [f"{image.width} wide {text}".strip() for text in group] for image, group in zip(images, texts, strict=True)
    ]


def fill(place: Path, **options):
    return fill_side_files(scan([place]), lambda item: {"_VLM": {"VLM": "", "short": "s"}}, describe, **options)


def test_every_image_gets_its_file(tmp_path: Path) -> None:
    write(tmp_path, good_files(3) | {"deep/wide.PNG": picture(1, 32, 80)})
    assert fill(tmp_path, batch_size=3).written == 4
    found = json.loads((tmp_path / "deep" / "wide_VLM.json").read_text())
    assert found == {"wide": {"VLM": "80 wide", "short": "80 wide s"}}
    assert json.loads((tmp_path / "0001_VLM.json").read_text())["0001"]["VLM"] == "64 wide"
    assert {item.name: item.captions.get("VLM") for item in scan([tmp_path])}["wide"] == "80 wide"


def test_a_shard_has_one_file(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", good_files(5))
    assert fill(tmp_path, batch_size=2).written == 5
    found = json.loads((tmp_path / "00000_VLM.json").read_text())
    assert list(found) == [f"{n:04d}" for n in range(5)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.tar", "00000_VLM.json"]


@pytest.mark.parametrize("tar", [False, True])
def test_what_is_there_stays(tmp_path: Path, tar: bool) -> None:
    place = write_tar(tmp_path / "a.tar", good_files(4)) if tar else write(tmp_path / "images", good_files(4))
    file = tmp_path / "a_VLM.json" if tar else place / "0001_VLM.json"
    file.write_text('{"0001": {"VLM": "mine", "short": "too", "more": "kept"}, "other": {"x": "y"}}')
    summary = fill(place)
    assert (summary.written, summary.present) == (3, 1)
    found = json.loads(file.read_text())
    assert found["0001"] == {"VLM": "mine", "short": "too", "more": "kept"}
    assert found["other"] == {"x": "y"}
    assert (fill(place).written, fill(place).present) == (0, 4)
    assert fill(place, overwrite=True).written == 4
    assert json.loads(file.read_text())["0001"] == {"VLM": "64 wide", "short": "64 wide s", "more": "kept"}


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class StoppedError(Exception):
        pass

    calls = []

    def failing(images, texts):
        calls.append(len(images))
        if len(calls) == 4:
            raise StoppedError
        return describe(images, texts)

    monkeypatch.setattr("sana.data.caption_files.SAVE_EVERY", 2)
    write(tmp_path / "a", good_files(6))
    write_tar(tmp_path / "b" / "00000.tar", good_files(6))
    for place in (tmp_path / "a", tmp_path / "b"):
        calls.clear()
        with pytest.raises(StoppedError):
            fill_side_files(scan([place]), lambda item: {"_VLM": {"VLM": ""}}, failing, batch_size=1)
        done = fill_side_files(scan([place]), lambda item: {"_VLM": {"VLM": ""}}, describe, batch_size=1)
        assert done.present >= 2
        assert done.written + done.present == 6


def test_broken_images_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, good_files(2) | {"cut.png": picture(3)[:100]})
    summary = fill(tmp_path)
    assert (summary.written, summary.broken) == (2, 1)
    assert not (tmp_path / "cut_VLM.json").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"0001": "caption"}'])
def test_a_damaged_file_is_not_overwritten(tmp_path: Path, text: str) -> None:
    write(tmp_path, good_files(2))
    (tmp_path / "0001_VLM.json").write_text(text)
    with pytest.raises(DataError, match=r"0001_VLM.json .*remove it"):
        fill(tmp_path)
    assert (tmp_path / "0001_VLM.json").read_text() == text


def test_processes_share_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, good_files(12))
    monkeypatch.setenv("WORLD_SIZE", "3")
    counts = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        counts.append(fill(tmp_path).written)
    assert sum(counts) == 12
    assert max(counts) < 12
    assert len(list(tmp_path.glob("*_VLM.json"))) == 12
