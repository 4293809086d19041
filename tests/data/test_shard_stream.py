"""Streams give every record once, in an order that a position can be found in again, over files, pipes and the web."""

import json
import random
import shlex
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from sana.data import shard_list
from sana.data.sample import BrokenSampleError, DataError
from sana.data.shard_list import list_shards
from sana.data.shard_records import RecordOptions
from sana.data.shard_stream import StreamedShards
from sana.data.shard_urls import expand_braces
from sana.data.webdataset import SanaWebDataset
from sana.utils.download import FetchError
from tests.data.tars import description, npy, picture, records, tar_bytes, write_shards

OPTIONS = RecordOptions(image_size=16, multi_scale=False)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def served(tmp_path):
    """Serves a folder on loopback; gives (folder, address, paths asked for)."""
    asked: list[str] = []

    class Handler(Quiet):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

    folder = tmp_path / "served"
    folder.mkdir()
    with _serving(partial(Handler, directory=str(folder))) as url:
        yield folder, url, asked


@contextmanager
def _serving(handler):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home for downloads, and permission to use the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(shard_list, "CACHE", tmp_path / "home" / "shards")
    return tmp_path / "home"


def stream(place, **options) -> StreamedShards:
    return StreamedShards(str(place), OPTIONS, **options)


def keys(stream) -> list[str]:
    return [sample.key for sample in stream]


def test_a_stream_gives_what_random_access_gives(tmp_path):
    write_shards(tmp_path, 2, 3)
    data = SanaWebDataset(data_dir=str(tmp_path), image_size=16)
    given = list(stream(tmp_path, shuffle=False))
    assert [sample.key for sample in given] == [data.key(index) for index in range(5)]
    for index, sample in enumerate(given):
        assert sample.caption == f"caption {index}"
        assert torch.equal(sample.image, torch.full((3, 16, 16), index, dtype=torch.uint8))


def test_the_order_of_shards_is_of_seed_and_epoch(tmp_path):
    write_shards(tmp_path, *[1] * 6)
    one, again, other = stream(tmp_path, seed=1), stream(tmp_path, seed=1), stream(tmp_path, seed=2)
    first = keys(one)
    assert first == keys(again) != keys(other)
    assert sorted(first) == [f"{number:06d}/{number:04d}" for number in range(6)]
    second = keys(one)  # the next epoch
    assert second != first
    again.set_epoch(1)
    assert keys(again) == second


@pytest.mark.parametrize("counts", [(3, 1, 2, 4, 1), (7,), (2, 5)])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_an_epoch_without_overlap(tmp_path, counts, world_size):
    write_shards(tmp_path, *counts)
    shares = [keys(stream(tmp_path, rank=rank, world_size=world_size)) for rank in range(world_size)]
    together = [key for share in shares for key in share]
    assert len(together) == len(set(together)) == sum(counts)


@pytest.mark.parametrize("counts", [(3, 1, 2, 4, 1), (7,)])
def test_workers_share_an_epoch_without_overlap(tmp_path, counts):
    write_shards(tmp_path, *counts)
    given = [sample.key for sample in DataLoader(stream(tmp_path), batch_size=None, num_workers=2)]
    assert len(given) == len(set(given)) == sum(counts)


@pytest.mark.parametrize("taken", [0, 1, 3, 7, 8])
def test_a_saved_position_is_found_again(tmp_path, taken):
    write_shards(tmp_path, 3, 1, 4)
    whole = keys(stream(tmp_path, seed=5))
    one = stream(tmp_path, seed=5)
    iterator = iter(one)
    assert [next(iterator).key for _ in range(taken)] == whole[:taken]
    assert one.state_dict() == {"epoch": 0, "consumed": taken}
    other = stream(tmp_path, seed=5)
    other.load_state_dict(one.state_dict())
    assert keys(other) == whole[taken:]


@pytest.mark.parametrize("taken", [0, 1, 4, 5])
def test_a_position_counted_behind_workers_is_found_again(tmp_path, taken):
    write_shards(tmp_path, 4, 4)
    loader = partial(DataLoader, batch_size=None, num_workers=2)
    whole = [sample.key for sample in loader(stream(tmp_path))]
    resumed = stream(tmp_path)
    resumed.load_state_dict({"epoch": 0, "consumed": taken})
    assert sorted(sample.key for sample in loader(resumed)) == sorted(whole[taken:])


def test_a_broken_record_is_raised_or_reported_and_counted(tmp_path):
    members = [*records(1), ("bad.png", b"x"), ("bad.json", description()), *records(1, start=1)]
    (tmp_path / "s.tar").write_bytes(tar_bytes(members))
    with pytest.raises(BrokenSampleError, match="s/bad"):
        list(stream(tmp_path))
    reported = []
    lenient = stream(tmp_path, on_broken=reported.append)
    assert keys(lenient) == ["s/0000", "s/0001"]
    assert [error.key for error in reported] == ["s/bad"]
    resumed = stream(tmp_path)
    resumed.load_state_dict({"epoch": 0, "consumed": 2})
    assert keys(resumed) == ["s/0001"]


def test_latents_are_streamed_too(tmp_path):
    members = [("a.json", description(width=16, height=16)), ("a.npy", npy(np.ones((4, 2, 2), np.float16)))]
    (tmp_path / "s.tar").write_bytes(tar_bytes(members))
    options = RecordOptions(image_size=16, multi_scale=False, load_vae_feat=True)
    (sample,) = StreamedShards(str(tmp_path), options)
    assert torch.equal(sample.latents, torch.ones(4, 2, 2))


def test_a_shard_that_ends_early_is_an_error_and_its_last_record_not_given(tmp_path):
    (path,) = write_shards(tmp_path, 3)
    path.write_bytes(path.read_bytes().rstrip(b"\0")[:-10])
    given = []
    with pytest.raises(DataError, match=r"000000.tar is cut off inside 0002.json"):
        given.extend(sample.key for sample in stream(tmp_path))
    reported = []
    assert keys(stream(tmp_path, on_broken=reported.append)) == ["000000/0000", "000000/0001"]
    assert len(reported) == 1


def test_members_that_are_apart_cannot_be_streamed(tmp_path):
    (tmp_path / "s.tar").write_bytes(tar_bytes([*records(2), ("0000.txt", b"apart")]))
    with pytest.raises(DataError, match="the members of 0000 are not next to each other"):
        list(stream(tmp_path))


def test_braces_stand_for_many():
    assert expand_braces("http://h/s-{008..010}.tar") == [
        f"http://h/s-{number}.tar" for number in ("008", "009", "010")
    ]
    assert expand_braces("plain.tar") == ["plain.tar"]


def test_the_web_is_streamed_and_fetched_once(served, home):
    folder, url, asked = served
    write_shards(folder, 2, 1)
    (folder / "000001_VLM.json").write_text('{"0002": {"VLM": "from the web"}}')
    place = url + "/{000000..000001}.tar"
    assert sorted(keys(stream(place))) == ["000000/0000", "000000/0001", "000001/0002"]
    assert not home.exists()  # nothing was kept

    asked.clear()
    options = {"image_size": 16, "external_caption_suffixes": ["_VLM"]}
    for _ in range(2):
        data = SanaWebDataset(data_dir=place, **options)
        assert [data.captions(index) for index in (0, 2)] == [["caption 0"], ["caption 2", "from the web"]]
    assert [path for path in asked if path.endswith(".tar")] == ["/000000.tar", "/000001.tar"]


def test_a_web_folder_is_read_through_its_metadata(served, home):
    folder, url, _ = served
    write_shards(folder, 2)
    SanaWebDataset(data_dir=str(folder), image_size=16)  # writes the metadata
    assert len(SanaWebDataset(data_dir=url, image_size=16)) == 2
    (folder / "bad.json").write_text('{"shardlist": [{"url": "file:///etc/passwd"}]}')
    with pytest.raises(DataError, match="only web addresses are read"):
        list_shards(f"{url}/bad.json")


def test_what_the_web_does_not_have_is_one_sentence(served, home):
    _, url, _ = served
    with pytest.raises(DataError, match=r"none.tar cannot be opened: .*404"):
        list(stream(f"{url}/none.tar"))
    with pytest.raises(FetchError, match="there is no such file"):
        SanaWebDataset(data_dir=f"{url}/none.tar", image_size=16)


def test_a_connection_that_breaks_off_is_an_error():
    content = tar_bytes([*records(1), ("0001.png", picture()), ("0001.npy", b"x" * 50_000)])

    class Cut(Quiet):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:20_000])

    with _serving(Cut) as url:
        iterator = iter(stream(f"{url}/s.tar"))
        assert next(iterator).key == "s/0000"
        with pytest.raises(DataError, match=r"s.tar (is cut off inside 0001.npy|broke off)"):
            next(iterator)


def test_a_command_is_streamed_and_kept(tmp_path, home):
    (path,) = write_shards(tmp_path, 2)
    trace = tmp_path / "ran"
    command = f"pipe:echo x >> {shlex.quote(str(trace))}; cat {shlex.quote(str(path))}"
    assert [sample.caption for sample in stream(command)] == ["caption 0", "caption 1"]
    for _ in range(2):
        assert len(SanaWebDataset(data_dir=command, image_size=16)) == 2
    assert trace.read_text() == "x\n" * 2  # once for the stream, once to keep it


def test_a_command_that_fails_is_an_error_and_nothing_is_kept(tmp_path, home):
    (path,) = write_shards(tmp_path, 2)
    for command in (f"pipe:cat {path}; exit 3", f"pipe:head -c 700 {path}", "pipe:exit 4"):
        with pytest.raises(DataError, match=r"failed|cut off"):
            SanaWebDataset(data_dir=command, image_size=16)
        with pytest.raises(DataError, match=r"failed|cut off"):
            list(stream(command))
    assert not list(home.rglob("*.tar"))


def test_leaving_a_command_early_is_no_failure(tmp_path):
    (path,) = write_shards(tmp_path, 40)
    iterator = iter(stream(f"pipe:cat {path} {path} {path}"))
    assert next(iterator).caption == "caption 0"
    iterator.close()


def test_s3_goes_through_the_aws_program(tmp_path, monkeypatch):
    (path,) = write_shards(tmp_path / "data", 1)
    program = tmp_path / "bin" / "aws"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\n[ "$*" = "s3 cp s3://bucket/it\'s \\$HOME.tar -" ] && cat {path}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    assert [sample.caption for sample in stream("s3://bucket/it's $HOME.tar")] == ["caption 0"]


def test_a_rank_outside_the_world_is_refused(tmp_path):
    write_shards(tmp_path, 1)
    with pytest.raises(ValueError, match="rank is 2 of 2"):
        stream(tmp_path, rank=2, world_size=2)


def with_captions(folder, *counts):
    """Writes shards with captions and scores beside all of them but the last; returns the suffixes."""
    paths = write_shards(folder, *counts)
    for number, path in enumerate(paths[:-1]):
        names = [f"{sum(counts[:number]) + record:04d}" for record in range(counts[number])]
        captions = {name: {"one": f"first {number} {name}", "two": "日本"} for name in names[1:]}  # the first has none
        scores = {name: {"one": 20 + number, "two": 27.5, "prompt": 30} for name in names}
        path.with_name(f"{path.stem}_VLM.json").write_text(json.dumps(captions))
        path.with_name(f"{path.stem}_VLM_clip_score.json").write_text(json.dumps(scores), encoding="utf-8")
    return {
        "external_caption_suffixes": ["_VLM", "_absent"],
        "external_clipscore_suffixes": ["_VLM_clip_score", "_absent"],
    }


@pytest.mark.parametrize("way", ["folder", "web"])
def test_files_beside_the_shards_are_read_as_with_random_access(tmp_path, served, home, way):
    folder, url, _ = served
    suffixes = with_captions(folder, 4, 3, 2)
    options = RecordOptions(image_size=16, multi_scale=False, clip_thr=21.0)
    data = SanaWebDataset(data_dir=str(folder), image_size=16, clip_thr=21.0, **suffixes)
    places = {"folder": str(folder), "web": f"{url}/{{000000..000002}}.tar"}
    kinds = set()
    for seed in range(5):
        given = StreamedShards(places[way], options, shuffle=False, seed=seed, **suffixes)
        for index, sample in enumerate(given):
            expected = data.load(index, random.Random(f"{seed} 0 {data.key(index)}"))
            assert (sample.key, sample.caption, sample.caption_type, sample.clip_score) == (
                expected.key,
                expected.caption,
                expected.caption_type,
                expected.clip_score,
            )
            assert torch.equal(sample.image, expected.image)
            kinds.add((sample.caption_type, sample.clip_score))
        assert index == len(data) - 1
    assert kinds == {("one", "21.0"), ("two", "27.5"), ("prompt", "30.0"), ("prompt", "")}


def test_damaged_files_beside_a_shard_end_the_stream(tmp_path):
    suffixes = with_captions(tmp_path, 2, 1)
    (tmp_path / "000000_VLM.json").write_text('{"0000": {"one": "cut')
    told = []
    with pytest.raises(DataError, match="000000_VLM.json is not a readable JSON mapping"):
        list(stream(tmp_path, shuffle=False, on_broken=told.append, **suffixes))
    assert told == []  # it is not one of the broken records that a budget lets pass


def test_files_beside_a_shard_that_cannot_be_fetched_end_the_stream(served, home):
    folder, url, _ = served
    suffixes = with_captions(folder, 2, 1)
    (folder / "000000_VLM.json").unlink()
    (folder / "000000_VLM.json").mkdir()
    (folder / "000000_VLM.json" / "index.html").mkdir(parents=True)  # the server answers with an error, not with 404
    with pytest.raises((FetchError, DataError), match="_VLM.json"):
        list(stream(f"{url}/000000.tar", **suffixes))


def test_nothing_is_beside_the_output_of_a_command(tmp_path):
    (path,) = write_shards(tmp_path, 2)
    place = f"pipe:cat {shlex.quote(str(path))}"
    assert len(list(stream(place))) == 2
    with pytest.raises(DataError, match="Beside the output of pipe:cat .* there are no files with captions or scores"):
        stream(place, external_caption_suffixes=["_VLM"])
