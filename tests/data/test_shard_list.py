"""Which shards a data set names, and what it is refused for."""

import json
import shutil

import pytest

from sana.data.sample import DataError
from sana.data.shard_list import keep_wids_meta, list_shards, open_shards
from tests.data.tars import records, tar_bytes, write_shards


def names(entries) -> list[str]:
    return [entry.name for entry in entries]


def write_meta(folder, *shards):
    (folder / "wids-meta.json").write_text(json.dumps({"shardlist": list(shards)}))


def test_a_folder_gives_its_shards_with_those_below_it(tmp_path):
    write_shards(tmp_path, 1, 1)
    write_shards(tmp_path / "more", 1)
    (tmp_path / ".000009.tar.part").write_bytes(b"half")
    assert names(list_shards(str(tmp_path))) == ["000000", "000001", "more/000000"]


def test_metadata_decides_about_shards_and_order(tmp_path, caplog):
    write_shards(tmp_path, 1, 1, 1)
    write_meta(tmp_path, {"url": "000002.tar", "nsamples": 1}, {"url": "./000000.tar", "nsamples": 1})
    with caplog.at_level("WARNING", "sana"):
        entries = list_shards(str(tmp_path))
    assert names(entries) == ["000002", "000000"]
    assert "000001.tar" in caplog.text
    assert names(list_shards(str(tmp_path / "wids-meta.json"))) == ["000002", "000000"]
    assert names(list_shards([str(tmp_path)], sort=True)) == ["000000", "000002"]


def test_braces_files_and_several_folders(tmp_path):
    write_shards(tmp_path / "a", 1, 1, 1)
    write_shards(tmp_path / "b", 1)
    assert names(list_shards(str(tmp_path / "a" / "{000001..000002}.tar"))) == ["000001", "000002"]
    both = list_shards([str(tmp_path / "a" / "000000.tar"), str(tmp_path / "b")])
    assert names(both) == ["a/000000", "b/000000"]
    same = list_shards([str(tmp_path / "b"), str(tmp_path / "b")])
    assert names(same) == ["b/000000#1", "b/000000#2"]


@pytest.mark.parametrize("nsamples", [2, 3, 4])
def test_the_count_of_records_may_be_by_the_official_rule_or_by_all_keys(tmp_path, nsamples):
    members = [*records(2), ("lone.png", records(1)[0][1]), ("text.txt", b"x")]
    (tmp_path / "s.tar").write_bytes(tar_bytes(members))
    write_meta(tmp_path, {"url": "s.tar", "nsamples": nsamples})
    ((_, index),) = open_shards(list_shards(str(tmp_path)))
    assert len(index) == 3


def test_a_difference_from_the_metadata_is_an_error(tmp_path):
    (path,) = write_shards(tmp_path, 2)
    size = path.stat().st_size
    write_meta(tmp_path, {"url": path.name, "nsamples": 7})
    with pytest.raises(DataError, match=r"000000.tar has 2 records, and its wids-meta.json says 7"):
        open_shards(list_shards(str(tmp_path)))
    write_meta(tmp_path, {"url": path.name, "nsamples": 2, "filesize": size + 1})
    with pytest.raises(DataError, match=rf"000000.tar has {size} bytes, and its wids-meta.json says {size + 1}"):
        open_shards(list_shards(str(tmp_path)))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"shardlist": [{}]}',
        b'{"shardlist": [{"url": 3}]}',
        b'{"shardlist": [{"url": "a", "nsamples": -1}]}',
    ],
)
def test_damaged_metadata_is_named(tmp_path, content):
    (tmp_path / "wids-meta.json").write_bytes(content)
    with pytest.raises(DataError, match=r"wids-meta.json is no list of shards"):
        list_shards(str(tmp_path))


def test_a_command_in_the_metadata_is_never_run(tmp_path):
    trace = tmp_path / "ran"
    for url in (f"pipe:touch {trace}", "s3://bucket/a.tar"):
        write_meta(tmp_path, {"url": url, "nsamples": 1})
        with pytest.raises(DataError, match=r"accepted only in data.data_dir"):
            open_shards(list_shards(str(tmp_path)))
    assert not trace.exists()


def test_a_shard_that_is_named_and_missing(tmp_path):
    write_meta(tmp_path, {"url": "gone.tar", "nsamples": 1})
    with pytest.raises(DataError, match=r"names the shard gone.tar, and there is no file"):
        list_shards(str(tmp_path))


def test_no_data_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match="No data was given"):
        list_shards([])
    with pytest.raises(DataError, match=r"There is no data at .*nowhere"):
        list_shards(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="No tar shards were found in"):
        list_shards(str(tmp_path))
    (tmp_path / "s.tar").write_bytes(tar_bytes([("a.txt", b"x")]))
    with pytest.raises(DataError, match=r"s.tar: no record with an image or latents"):
        open_shards(list_shards(str(tmp_path)))


def test_the_metadata_that_is_made_is_the_official_one(tmp_path):
    paths = write_shards(tmp_path, 2, 1)
    opened = open_shards(list_shards(str(tmp_path)))
    assert keep_wids_meta(opened, tmp_path)
    meta = json.loads((tmp_path / "wids-meta.json").read_text())
    assert set(meta) == {"name", "__kind__", "wids_version", "shardlist"}
    assert meta["shardlist"] == [
        {"url": path.name, "nsamples": count, "filesize": path.stat().st_size} for path, count in zip(paths, (2, 1))
    ]
    assert not keep_wids_meta(opened, tmp_path)
    assert names(list_shards(str(tmp_path))) == ["000000", "000001"]


def test_a_folder_that_went_away_keeps_nothing(tmp_path):
    write_shards(tmp_path / "d", 1)
    opened = open_shards(list_shards(str(tmp_path / "d")))
    shutil.rmtree(tmp_path / "d")
    assert not keep_wids_meta(opened, tmp_path / "d")
