"""A data set with every fault is reported fault by fault; a good one is clean, in folders and in tar shards."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sana.data.check import KINDS, CheckOptions, check_data, word_limit
from sana.data.sample import DataError
from sana.data.scan import scan
from tests.parity.common import DEFAULT_FOLDER


def picture(seed: int, height: int = 64, width: int = 64) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def good_files(count: int = 3) -> dict[str, bytes]:
    files = {f"{number:04d}.png": picture(number) for number in range(count)}
    return files | {f"{number:04d}.txt": f"caption {number}".encode() for number in range(count)}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def check(*places: Path, **options):
    return check_data(scan(places), CheckOptions(**{"image_size": 64, **options}))


def faults(report) -> dict[str, list[str]]:
    return {kind: [entry["key"] for entry in entries] for kind, entries in report.problems.items() if entries}


@pytest.mark.parametrize("tar", [False, True])
def test_a_good_data_set_is_clean(tmp_path: Path, tar: bool) -> None:
    files = good_files()
    place = write_tar(tmp_path / "00000.tar", files) if tar else write(tmp_path / "images", files)
    report = check(place, batch_size=3)
    assert report.clean, report.problems
    assert (report.images, report.captions, dict(report.buckets)) == (3, 3, {"1.0": 3})
    assert report.as_dict()["sizes"]["height"] == {"min": 64, "median": 64, "max": 64}
    assert set(report.problems) == set(KINDS)


@pytest.mark.parametrize("tar", [False, True])
def test_every_fault_is_named(tmp_path: Path, tar: bool) -> None:
    files = good_files() | {
        "cut.png": picture(9)[:200],
        "cut.txt": b"a cut picture",
        "empty.png": b"",
        "empty.txt": b"an empty file",
        "bare.png": picture(10),
        "blank.png": picture(11),
        "blank.txt": b"  \n",
        "lonely.txt": b"no picture",
        "twin.png": picture(1),
        "twin.txt": b"as 0001",
        "long.png": picture(12),
        "long.txt": b"word " * 40,
    }
    place = write_tar(tmp_path / "00000.tar", files) if tar else write(tmp_path / "images", files)
    report = check(place, batch_size=8, caption_excess=word_limit(39))
    prefix, ending = ("00000/", "") if tar else ("", ".png")
    assert {kind: sorted(keys) for kind, keys in faults(report).items()} == {
        "unreadable": [f"{prefix}cut{ending}", f"{prefix}empty{ending}"],
        "no_caption": [f"{prefix}bare{ending}", f"{prefix}blank{ending}"],
        "no_image": [f"{prefix}lonely" if tar else "lonely.txt"],
        "duplicate": [f"{prefix}twin{ending}"],
        "long_caption": [f"{prefix}long{ending}"],
        "starved_bucket": ["1.0"],
    }
    assert report.problems["duplicate"][0]["detail"] == f"the same file as {prefix}0001{ending}"
    assert report.problems["long_caption"][0]["detail"] == "prompt: 40 words, more than 39"
    assert report.buckets["1.0"] == 5  # three good ones, the twin and the long one
    assert not report.clean
    json.dumps(report.as_dict())


def test_buckets_of_a_table_are_counted(tmp_path: Path) -> None:
    files = {f"{n}.png": picture(n, height, width) for n, (height, width) in enumerate([(64, 64), (64, 65), (32, 128)])}
    files |= {f"{n}.txt": b"caption" for n in range(3)}
    report = check(write(tmp_path, files), aspect_ratio_type="ASPECT_RATIO_256", batch_size=2)
    assert report.as_dict()["buckets"] == {"0.25": 1, "1.0": 2}
    assert [entry["detail"] for entry in report.problems["starved_bucket"]] == ["1 images, and a batch has 2"]
    assert report.smaller == 3
    assert check(tmp_path, batch_size=2, image_size=64).smaller == 1


def test_captions_of_captioners_count(tmp_path: Path) -> None:
    files = {
        "a.png": picture(0),
        "a_VLM.json": b'{"a": {"VLM": "one", "short": "two"}}',
        "a_VLM_clip_score.json": b'{"a": {"VLM": "20.0"}}',
        "a_b.png": picture(1),
        "a_b_VLM.json": b'{"a_b": {"VLM": "three"}}',
        "gone_VLM.json": b'{"gone": {"VLM": "of no picture"}}',
        "meta_data.json": b'{"img_names": ["a.png"]}',
        "deep/c.PNG": picture(2),
        "deep/c_VLM.json": b"{",
        "deep/c.txt": b"text",
    }
    report = check(write(tmp_path, files))
    assert (report.images, report.captions) == (3, 4)
    assert faults(report) == {"no_image": ["gone_VLM.json"], "damaged_side_file": ["deep/c.PNG"]}


def test_captions_beside_shards_count(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", {name: good_files()[name] for name in ("0000.png", "0001.png")})
    (tmp_path / "00000_VLM.json").write_text('{"0000": {"VLM": "one"}, "0009": {"VLM": "gone"}}')
    report = check(tmp_path)
    assert faults(report) == {"no_caption": ["00000/0001"], "no_image": ["00000/0009"]}


def test_a_cut_shard_is_one_problem_among_others(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tar", good_files())
    (tmp_path / "b.tar").write_bytes(whole.read_bytes()[:1500])
    report = check(tmp_path)
    assert faults(report) == {"unreadable": ["b"]}
    assert report.images == 3


def test_a_large_image_is_unreadable(tmp_path: Path) -> None:
    report = check(write(tmp_path, good_files(1)), max_pixels=64 * 64 - 1)

    assert "more than the 4095" in report.problems["unreadable"][0]["detail"]


def test_nothing_is_not_clean(tmp_path: Path) -> None:
    assert not check(tmp_path).clean
    with pytest.raises(DataError, match="nowhere does not exist"):
        check(tmp_path / "nowhere")


def test_the_recorded_folders_are_read() -> None:
    """The official formats: every image of the recorded examples is found with the captions that stand there."""
    folder = DEFAULT_FOLDER / "data" / "example_folder"
    found = {item.name: item for item in scan([folder])}
    assert len(found) == 6
    assert found["00000000"].captions == {
        "prompt": "caption number 0 blue shapes",
        "InternVL2-26B": "internvl caption 0",
        "VILA1-5-13B": "vila caption 0",
        "short": "s0",
    }
    shards = {item.name: item for item in scan([DEFAULT_FOLDER / "data" / "example_webdataset"])}
    assert shards["00000000"].captions == {"prompt": "caption number 0 blue shapes", "VILA1-5-13B": "vila 00000000"}
    assert len(shards) == 6
