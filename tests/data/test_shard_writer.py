"""Packing a folder: what is packed comes out again, the bytes are always the same, and a killed run is taken up."""

import json
import os
import shutil
import tarfile

import numpy as np
import pytest

from sana.data.image_folder import SanaImgDataset
from sana.data.sample import DataError
from sana.data.shard_index import build_index
from sana.data.shard_writer import find_suffixes, pack_folder
from sana.data.webdataset import SanaWebDataset
from tests.data.tars import npy, npz, picture


def make_folder(folder, count=7):
    """Pictures in folders, of every ending, with captions, some with side files."""
    for number in range(count):
        place = folder / ("", "deep/er", "other")[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        ending, kind = [("png", "PNG"), ("JPG", "JPEG"), ("webp", "WEBP"), ("jpeg", "JPEG")][number % 4]
        name = f"image {number}.x"
        (place / f"{name}.{ending}").write_bytes(picture(10 + number, 8, (number, 0, 0), kind))
        (place / f"{name}.txt").write_text(f"caption {number}\nsecond line\n", encoding="utf-8")
        if number % 2:
            (place / f"{name}_VLM.json").write_text(json.dumps({name: {"VLM": f"model on {number} ü"}}))
            (place / f"{name}_VLM_clip_score.json").write_text(json.dumps({name: {"VLM": str(number), "prompt": 2}}))
    return folder


def tree(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_shards_hold_what_the_folder_holds(tmp_path):
    source = make_folder(tmp_path / "in")
    seen = []
    summary = pack_folder(
        source, tmp_path / "out", shard_size=3, on_start=seen.append, on_record=lambda: seen.append(0)
    )
    assert (summary.records, summary.shards, summary.kept, summary.broken) == (7, 3, 0, [])
    assert seen == [7] + [0] * 7
    options = {
        "image_size": 8, "external_caption_suffixes": ["_VLM"], "external_clipscore_suffixes": ["_VLM_clip_score"],
    }  # fmt: skip
    folder = SanaImgDataset(data_dir=source, caption_lines="all", **options)
    shards = SanaWebDataset(data_dir=str(tmp_path / "out"), **options)
    assert len(shards) == len(folder) == 7
    for index in range(7):
        assert shards.image_bytes(index) == folder.image_bytes(index)
        assert shards.scored_captions(index) == folder.scored_captions(index)


def test_the_layout_is_the_official_one(tmp_path):
    pack_folder(make_folder(tmp_path / "in", 4), tmp_path / "out", shard_size=2)
    assert sorted(tree(tmp_path / "out")) == [
        "00000000.tar", "00000000_VLM.json", "00000000_VLM_clip_score.json",
        "00000001.tar", "00000001_VLM.json", "00000001_VLM_clip_score.json", "wids-meta.json",
    ]  # fmt: skip
    with tarfile.open(tmp_path / "out" / "00000000.tar") as tar:
        infos = tar.getmembers()
        described = json.load(tar.extractfile(infos[0]))
    key = infos[0].name.split(".")[0]
    assert described.pop("file_name") in [info.name for info in infos]
    assert set(described) == {"prompt", "width", "height"}
    for info in infos:
        assert (info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) == (0, 0, 0, "", "", 0o644)
    meta = json.loads((tmp_path / "out" / "wids-meta.json").read_text())
    assert [shard["url"] for shard in meta["shardlist"]] == ["00000000.tar", "00000001.tar"]
    scores = json.loads((tmp_path / "out" / "00000000_VLM_clip_score.json").read_text())
    assert all(set(entry) == {"VLM", "prompt"} for entry in scores.values())
    assert "." not in key


def test_the_bytes_do_not_depend_on_time_or_place(tmp_path):
    source = make_folder(tmp_path / "in")
    pack_folder(source, tmp_path / "one", shard_size=3)
    other = shutil.copytree(source, tmp_path / "elsewhere" / "in", copy_function=shutil.copyfile)
    for path in other.rglob("*.*"):
        if path.is_file():
            os.utime(path, (1, 1))
            path.chmod(0o600)
    pack_folder(other, tmp_path / "two", shard_size=3)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


class Killed(BaseException):
    """Stands for a signal: nothing handles it."""


def test_a_killed_run_is_taken_up_with_equal_bytes(tmp_path, monkeypatch):
    """Stops before every rename in turn, with the temporary file left behind as by SIGKILL."""
    source = make_folder(tmp_path / "in")
    pack_folder(source, tmp_path / "whole", shard_size=2)
    whole = tree(tmp_path / "whole")
    for survived in range(len(whole)):
        output = tmp_path / f"out{survived}"
        _pack_until_killed(source, output, survived, monkeypatch)
        left = tree(output)
        finished = {name: content for name, content in left.items() if not name.endswith(".part")}
        assert len(finished) == survived < len(left)
        assert finished.items() <= whole.items()
        assert "wids-meta.json" not in left
        summary = pack_folder(source, output, shard_size=2)
        assert summary.kept == sum(name.endswith(".tar") for name in finished)
        assert tree(output) == whole


def _pack_until_killed(source, output, survived, monkeypatch):
    renamed = []

    def replace(part, target, real=os.replace):
        if len(renamed) == survived:
            raise Killed
        renamed.append(target)
        real(part, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        patched.setattr(os, "unlink", lambda path: None)  # a killed process does not clean up
        patched.setattr(type(output), "unlink", lambda self, missing_ok=False: None)
        with pytest.raises(Killed):
            pack_folder(source, output, shard_size=2)


def test_a_finished_run_is_left_alone(tmp_path):
    source = make_folder(tmp_path / "in")
    pack_folder(source, tmp_path / "out", shard_size=3)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert pack_folder(source, tmp_path / "out", shard_size=3).kept == 3
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")} == before


@pytest.mark.parametrize("change", ["caption", "size", "fewer", "image"])
def test_other_shards_in_the_output_are_refused_unless_told(tmp_path, change):
    source = make_folder(tmp_path / "in")
    pack_folder(source, tmp_path / "out", shard_size=3)
    before = tree(tmp_path / "out")
    if change == "caption":
        (source / "image 0.x.txt").write_text("another text\nsecond line\n")
    elif change == "fewer":
        (source / "other" / "image 5.x.txt").unlink()
    elif change == "image":
        (source / "image 0.x.png").write_bytes(picture(50, 50))
    size = 2 if change == "size" else 3
    with pytest.raises(DataError, match=r"holds something else than this conversion would write.*--overwrite"):
        pack_folder(source, tmp_path / "out", shard_size=size)
    assert {name: content for name, content in tree(tmp_path / "out").items() if name in before} == before
    pack_folder(source, tmp_path / "out", shard_size=size, overwrite=True)
    pack_folder(source, tmp_path / "fresh", shard_size=size)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_no_shard_is_larger_than_allowed(tmp_path):
    source = make_folder(tmp_path / "in", 30)
    summary = pack_folder(source, tmp_path / "out", max_bytes=20_480)
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.tar")]
    assert max(sizes) <= 20_480
    assert summary.shards == len(sizes) > 2
    for path in (tmp_path / "out").glob("*.tar"):
        with tarfile.open(path) as tar:  # a member takes a header and whole blocks; no extended headers were written
            used = sum(512 + -(-info.size // 512) * 512 for info in tar)
        assert path.stat().st_size == -(-(used + 1024) // 10240) * 10240


def test_equal_names_become_different_keys(tmp_path):
    for folder in ("a", "b", "a__x"):
        (tmp_path / "in" / folder).mkdir(parents=True)
    names = [
        "a/x.png",
        "b/x.png",
        "b/x.jpg",
        "a__x/x.png",
        "x.y.png",
        "x_y.png",
        "a__x.png",
        "only.png",
        f"{'ü' * 99}.png",
    ]
    for name in names:
        (tmp_path / "in" / name).write_bytes(picture(kind="JPEG" if name.endswith("jpg") else "PNG"))
        (tmp_path / "in" / name).with_suffix(".txt").write_text(name)
    pack_folder(tmp_path / "in", tmp_path / "out")
    index = build_index(tmp_path / "out" / "00000000.tar")
    assert len(set(index.keys)) == len(index.keys) == len(names)
    assert {"a__x", "b__x", "only", "ü" * 40} <= set(index.keys)


def test_features_beside_the_images_come_along(tmp_path):
    source = make_folder(tmp_path / "in", 1)
    latents = np.ones((4, 1, 1), np.float16)
    (source / "image 0.x.npy").write_bytes(npy(latents))
    (source / "image 0.x.npz").write_bytes(npz(caption_feature=np.zeros((1, 2, 3), np.float16)))
    pack_folder(source, tmp_path / "out")
    index = build_index(tmp_path / "out" / "00000000.tar")
    assert index.read(0, "npy", "k") == npy(latents)
    assert index.has(0, "npz")


def test_side_files_belong_to_the_longest_name(tmp_path):
    for name in ("a.png", "a_b.png", "a_b_VLM.json", "a_X_Y.json", "meta_data.json", "none_VLM.json", "a.json"):
        (tmp_path / name).write_text("x")
    os.symlink(tmp_path, tmp_path / "circle")
    assert find_suffixes(tmp_path) == ["_VLM", "_X_Y"]


def test_an_unreadable_image_stops_or_is_left_out(tmp_path):
    source = make_folder(tmp_path / "in", 3)
    (source / "bad.png").write_bytes(b"no picture")
    (source / "bad.txt").write_text("text")
    with pytest.raises(DataError, match=r"bad.png cannot be packed \(the image is not a PNG"):
        pack_folder(source, tmp_path / "out")
    assert not (tmp_path / "out" / "wids-meta.json").exists()
    summary = pack_folder(source, tmp_path / "out", skip_broken=True)
    assert summary.records == 3
    assert len(summary.broken) == 1 and "bad.png" in summary.broken[0]


def test_what_cannot_be_packed_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match="There is no folder"):
        pack_folder(tmp_path / "none", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="No captioned image in"):
        pack_folder(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(DataError, match="is the input folder itself"):
        pack_folder(tmp_path / "empty", tmp_path / "empty")
    with pytest.raises(ValueError, match="at least 1"):
        pack_folder(tmp_path / "empty", tmp_path / "out", shard_size=0)
    (tmp_path / "empty" / "a.png").write_bytes(b"no picture")
    (tmp_path / "empty" / "a.txt").write_text("text")
    with pytest.raises(DataError, match="None of the 1 images .* can be read"):
        pack_folder(tmp_path / "empty", tmp_path / "out", skip_broken=True)


def test_a_full_disk_leaves_finished_shards_and_nothing_half(tmp_path, monkeypatch):
    source = make_folder(tmp_path / "in")
    pack_folder(source, tmp_path / "whole", shard_size=2)
    real, calls = os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left"):
            pack_folder(source, tmp_path / "out", shard_size=2)
    left = tree(tmp_path / "out")
    assert left and left.items() <= tree(tmp_path / "whole").items()
