"""Sizes of images are read once, remembered where that can be written, and read anew whenever a file has changed."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from sana.data import size_index
from sana.data.image_folder import SanaImgDataset
from sana.data.image_records import find_records
from sana.data.sample import BrokenSampleError

INDEX = ".sana-index/image_sizes.json"
SHAPES = [(64, 64), (128, 64), (64, 128), (64, 96)]  # (width, height)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of four images are large ones."""
    monkeypatch.setattr(size_index, "KEPT_FROM", 4)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose headers were read."""
    names, real = [], size_index.image_size

    def counted(path: str, *arguments: object, **options: object) -> tuple[int, int]:
        names.append(Path(path).name)
        return real(path, *arguments, **options)

    monkeypatch.setattr(size_index, "image_size", counted)
    return names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, shape in enumerate(SHAPES):
        add(tmp_path / "data" / ("deep" if number % 2 else "."), f"{number}.png", shape)
    return tmp_path / "data"


def add(folder: Path, name: str, shape: tuple[int, int]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", shape, (9, 9, 9)).save(folder / name)
    (folder / name).with_suffix(".txt").write_text("a caption")
    return folder / name


def dataset(*folders: Path, **options) -> SanaImgDataset:
    return SanaImgDataset(data_dir=list(folders), multi_scale=True, aspect_ratio_type="ASPECT_RATIO_256", **options)


def test_headers_are_read_once_however_often_a_run_starts(folder: Path, read: list[str]) -> None:
    first = dataset(folder).buckets()
    assert sorted(read) == ["0.png", "1.png", "2.png", "3.png"] and len(set(first)) >= 3
    assert set(json.loads((folder / INDEX).read_text())["sizes"]) == {"0.png", "2.png", "deep/1.png", "deep/3.png"}
    before = (folder / INDEX).stat().st_mtime_ns
    assert dataset(folder).buckets() == first
    assert dataset(f"{folder}/").buckets() == first  # however it is written
    assert len(read) == 4
    assert (folder / INDEX).stat().st_mtime_ns == before  # nor is what is known written again
    assert len(dataset(folder)) == 4  # the index is no image of the folder


def test_only_what_changed_is_read_again(folder: Path, read: list[str]) -> None:
    dataset(folder).buckets()
    read.clear()
    add(folder, "0.png", (128, 64))  # another picture of the same name
    add(folder, "9.png", (64, 128))
    status = (folder / "2.png").stat()
    os.utime(folder / "2.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # nothing but its time
    (folder / "deep/3.png").unlink()
    buckets = dict(zip([record.key for record in dataset(folder).records], dataset(folder).buckets(), strict=True))
    assert sorted(read) == ["0.png", "2.png", "9.png"]
    assert (buckets["0.png"], buckets["9.png"]) == (buckets["deep/1.png"], buckets["2.png"])
    assert set(json.loads((folder / INDEX).read_text())["sizes"]) == {"0.png", "2.png", "9.png", "deep/1.png"}


def test_broken_files_are_not_remembered(folder: Path, read: list[str]) -> None:
    (folder / "0.png").write_bytes(b"no picture")
    (entry, *others) = size_index.image_sizes([folder], find_records([folder]), max_pixels=10**6)
    assert isinstance(entry, BrokenSampleError) and others == [(128, 64), (64, 128), (96, 64)]
    read.clear()
    assert dataset(folder).buckets()
    assert read == ["0.png"]
    # nor does an index let a picture through that is too large by now
    read.clear()
    sizes = size_index.image_sizes([folder], find_records([folder]), max_pixels=64 * 96)
    assert [isinstance(size, BrokenSampleError) for size in sizes] == [True, True, True, False]
    assert sorted(read) == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"format": 99, "sizes": {}}', '{"format": 1, "sizes": {"0.png": [1, 2, 3]}}',
     '{"format": 1, "sizes": {"0.png": [1, 2, "a", 4]}}', '{"format": 1, "sizes": 5}'],
)  # fmt: skip
def test_a_damaged_index_is_made_anew(folder: Path, read: list[str], content: str) -> None:
    first = dataset(folder).buckets()
    whole = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(content)
    assert dataset(folder).buckets() == first
    assert len(read) == 8
    assert json.loads((folder / INDEX).read_text()) == whole


def test_a_folder_that_cannot_be_written_works(folder: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, content: bytes) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(size_index, "write_atomically", refuse)
    assert dataset(folder).buckets() == dataset(folder).buckets()
    assert len(read) == 8 and not (folder / INDEX).exists()
    (folder / ".sana-index").rmdir()
    (folder / ".sana-index").write_text("in the way")
    assert dataset(folder).buckets()


def test_small_folders_get_no_index_and_large_ones_one_each(folder: Path, tmp_path: Path, read: list[str]) -> None:
    other = add(tmp_path / "other", "0.png", (128, 64)).parent
    for _ in range(2):
        data = dataset(other, folder)
        buckets = data.buckets()
        assert data.key(0) == "0.png" and data.key(1) == "1:0.png"
        assert buckets[0] != buckets[1]  # two files of one name
    assert (folder / INDEX).exists() and not (other / ".sana-index").exists()
    assert sorted(read) == ["0.png", "0.png", "0.png", "1.png", "2.png", "3.png"]  # the small folder's twice


def test_a_folder_inside_another_is_read_once(folder: Path, read: list[str]) -> None:
    data = dataset(folder, folder / "deep")
    buckets = dict(zip([data.key(index) for index in range(len(data))], data.buckets(), strict=True))
    assert len(buckets) == 6 and len(read) == 4
    assert [buckets["deep/1.png"], buckets["deep/3.png"]] == [buckets["1.png"], buckets["3.png"]]
