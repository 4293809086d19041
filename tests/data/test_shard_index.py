"""The index of a shard agrees with tarfile, is kept only as long as the shard stays, and guards every read."""

import json
import os
import tarfile

import numpy as np
import pytest

from sana.data import shard_index
from sana.data.sample import BrokenSampleError, DataError
from sana.data.shard_index import KINDS, build_index, read_index, split_name
from tests.data.tars import description, npy, picture, records, tar_bytes, write_shards


@pytest.fixture
def cached(monkeypatch):
    """Indexes are kept for small shards too, and building one is counted."""
    built = []
    build = shard_index.build_index
    monkeypatch.setattr(shard_index, "CACHED_FROM", 0)
    monkeypatch.setattr(shard_index, "build_index", lambda path: (built.append(path), build(path))[1])
    return built


def write(path, members):
    path.write_bytes(tar_bytes(members))
    return path


def test_every_member_is_where_tarfile_finds_it(tmp_path):
    (path,) = write_shards(tmp_path, 3)
    index = build_index(path)
    assert index.keys == ("0000", "0001", "0002")
    with tarfile.open(path) as tar:
        for info in tar:
            key, kind = info.name.split(".")
            record = index.keys.index(key)
            assert index.spans[record, KINDS.index(kind)].tolist() == [info.offset_data, info.size]
            assert index.read(record, kind, key) == tar.extractfile(info).read()
    assert index.image_sizes.tolist() == [[8, 12]] * 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.png", ("a", "png")),
        ("d.e/a.b.PNG", ("d.e/a", "b.png")),
        ("a", ("a", "")),
        ("x/.hidden.png", ("", "hidden.png")),
    ],
)
def test_keys_end_at_the_first_dot_after_the_last_slash(name, expected):
    assert split_name(name) == expected


def test_members_of_a_record_may_be_apart_and_in_any_case(tmp_path):
    members = [
        ("b.JSON", description()),
        ("a.Png", picture()),
        ("note.txt", b"no image"),
        ("b.JPG", picture(kind="JPEG")),
    ]
    index = build_index(write(tmp_path / "s.tar", members))
    assert index.keys == ("b", "a")
    assert [index.image_kind(0), index.image_kind(1)] == ["jpg", "png"]
    assert index.counts == (2, 1, 3)  # by our rule, by the official one, and every key


def test_sizes_come_from_the_description_else_from_the_image_else_from_the_latents(tmp_path):
    members = [
        ("told.json", description(width=300, height=200)),
        ("told.png", picture(3, 5)),
        ("seen.png", picture(31, 17)),
        ("senseless.json", description(width=-1, height="x")),
        ("senseless.webp", picture(9, 4, kind="WEBP")),
        ("latents.npy", npy(np.zeros((32, 6, 7), np.float32))),
        ("broken.png", b"no picture"),
    ]
    index = build_index(write(tmp_path / "s.tar", members))
    sizes = dict(zip(index.keys, index.image_sizes.tolist()))
    assert sizes == {"told": [200, 300], "seen": [17, 31], "senseless": [4, 9], "latents": [6, 7], "broken": [0, 0]}


def test_a_size_behind_a_long_header_is_found(tmp_path):
    jpeg = picture(20, 10, kind="JPEG")
    segment = b"\xff\xe1" + (65000).to_bytes(2, "big") + b"\0" * 64998
    index = build_index(write(tmp_path / "s.tar", [("a.jpg", jpeg[:2] + segment * 3 + jpeg[2:])]))
    assert index.image_sizes.tolist() == [[10, 20]]


def test_a_member_that_is_there_twice_is_refused(tmp_path):
    path = write(tmp_path / "s.tar", [*records(1), ("0000.PNG", picture())])
    with pytest.raises(DataError, match="s.tar holds 0000.PNG twice"):
        build_index(path)


def test_a_missing_shard_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match="none.tar cannot be read: No such file"):
        read_index(tmp_path / "none.tar")


@pytest.mark.parametrize("beside", [True, False])
def test_the_index_is_kept_and_used(tmp_path, cached, beside):
    (path,) = write_shards(tmp_path / "data", 2)
    cache_dir = None if beside else tmp_path / "cache"
    first, second = read_index(path, cache_dir=cache_dir), read_index(path, cache_dir=cache_dir)
    assert cached == [path]
    assert (first.keys, first.counts, first.stamp) == (second.keys, second.counts, second.stamp)
    np.testing.assert_array_equal(first.spans, second.spans)
    np.testing.assert_array_equal(first.image_sizes, second.image_sizes)
    assert (path.parent / ".sana-index").is_dir() == beside
    assert not list(tmp_path.rglob("*.part"))


def test_a_changed_shard_is_indexed_anew(tmp_path, cached):
    (path,) = write_shards(tmp_path, 2)
    read_index(path)
    status = path.stat()
    path.write_bytes(tar_bytes(records(2, start=5)))  # of the same length
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert read_index(path).keys == ("0005", "0006")


@pytest.mark.parametrize(
    "forge",
    [
        lambda content: content["records"][0][2].update(png=[512, 1 << 40]),
        lambda content: content["records"][0][2].update(png=[-512, 10]),
        lambda content: content["records"][0][2].update(exe=[512, 10]),
        lambda content: content["records"].append("nonsense"),
        lambda content: content["records"].append(content["records"][0]),
        lambda content: content.update(format=2),
        lambda content: content.pop("stamp"),
    ],
)
def test_a_forged_index_is_not_used(tmp_path, cached, forge):
    (path,) = write_shards(tmp_path, 2)
    read_index(path)
    (kept,) = (tmp_path / ".sana-index").iterdir()
    content = json.loads(kept.read_text())
    forge(content)
    kept.write_text(json.dumps(content))
    np.testing.assert_array_equal(read_index(path).spans, build_index(path).spans)
    assert len(cached) == 2
    read_index(path)  # the good one was put in its place
    assert len(cached) == 2


def test_an_index_that_cannot_be_kept_is_no_fault(tmp_path, cached):
    (path,) = write_shards(tmp_path, 1)
    (tmp_path / ".sana-index").write_text("a file where the folder should be")
    assert len(read_index(path)) == 1


def test_a_record_that_moved_is_broken_by_name(tmp_path):
    (path,) = write_shards(tmp_path, 2)
    index = build_index(path)
    content = path.read_bytes()
    path.write_bytes(content[512:] + b"\0" * 512)
    with pytest.raises(BrokenSampleError, match=r"s/0001: .*000000.tar does not have its .png where the index says"):
        index.read(1, "png", "s/0001")
    path.write_bytes(content[:1000])
    with pytest.raises(BrokenSampleError, match=r"000000.tar had \d+ bytes when it was indexed and has 1000 now"):
        index.read(0, "png", "s/0000")
    path.unlink()
    with pytest.raises(BrokenSampleError, match="cannot be read"):
        index.read(0, "png", "s/0000")
    with pytest.raises(BrokenSampleError, match="has no .npy"):
        index.read(0, "npy", "s/0000")
