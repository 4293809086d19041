"""Batches of streams: every record once a pass, buckets kept apart, exact places, ranks in step, broken records."""

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice, takewhile

import pytest
import torch

from sana.data.sample import DataError
from sana.data.shard_records import RecordOptions
from sana.data.shard_stream import StreamedShards
from sana.data.stream_loader import StreamLoader
from tests.data.tars import description, picture, tar_bytes, write_shards

SIZES = ((128, 128), (64, 256), (256, 64))  # (width, height) of three buckets


@pytest.fixture
def mixed(tmp_path):
    """Four shards of 3, 5, 2 and 6 records; every third record is wide, every third is high."""
    folder, numbers = tmp_path / "mixed", iter(range(16))
    folder.mkdir()
    for shard, count in enumerate((3, 5, 2, 6)):
        members = []
        for number in islice(numbers, count):
            width, height = SIZES[number % 3]
            members.append((f"{number:04d}.png", picture(width, height, (number, number, number))))
            members.append((f"{number:04d}.json", description(f"caption {number}", width, height)))
        (folder / f"{shard:06d}.tar").write_bytes(tar_bytes(members))
    return folder


def loader(place, batch_size=2, *, rank=0, world_size=1, samples=16, seed=0, **options):
    records = RecordOptions(image_size=128, aspect_ratio_type="ASPECT_RATIO_256")
    shards = StreamedShards(str(place), records, rank=rank, world_size=world_size, seed=seed)
    return StreamLoader(shards, batch_size, samples=samples, **options)


def seen(source, batches):
    return [source.next_batch() for _ in range(batches)]


def keys(batches):
    return [key for batch in batches for key in batch.keys]


def assert_same(first, second):
    assert [(b.keys, b.captions, b.epoch) for b in first] == [(b.keys, b.captions, b.epoch) for b in second]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.images, other.images)


def test_batches_are_of_one_bucket_and_match_their_records(mixed):
    for batch in seen(loader(mixed), 24):
        numbers = [int(key.rpartition("/")[2]) for key in batch.keys]
        assert len({number % 3 for number in numbers}) == 1
        assert batch.captions == [f"caption {number}" for number in numbers]
        for image, number in zip(batch.images, numbers, strict=True):
            assert image.dtype == torch.uint8 and (image == number).all()
        assert batch.images.shape[2] / batch.images.shape[3] == pytest.approx((1, 4, 0.25)[numbers[0] % 3], rel=0.1)


def test_every_record_is_seen_equally_often_but_for_those_that_wait(mixed):
    passes = 6
    given = keys(seen(loader(mixed), 8 * passes))
    counts = {key: given.count(key) for key in given}
    assert len(counts) == 16
    assert set(counts.values()) <= {passes - 1, passes, passes + 1}  # a bucket of odd size carries one record over


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 1, 5, 8, 13])
def test_a_saved_place_is_found_again_with_half_filled_buckets(mixed, taken, num_workers):
    whole = seen(loader(mixed, 3, seed=4), 20)
    broken = loader(mixed, 3, seed=4, num_workers=num_workers)
    seen(broken, taken)
    state = broken.state_dict()
    broken.close()
    resumed = loader(mixed, 3, seed=4, num_workers=num_workers)
    resumed.load_state_dict(state)
    assert (resumed.epoch, resumed.batches_left) == (broken.epoch, broken.batches_left)
    assert_same(seen(resumed, 20 - taken), whole[taken:])
    resumed.close()
    assert taken == 0 or any(state["waiting"].values())  # or it would show nothing


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_have_different_records_and_equally_many_batches(mixed, world_size):
    ranks = [loader(mixed, 1, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {source.len_epoch for source in ranks} == {16 // world_size}
    firsts = []
    for source in ranks:
        records = takewhile(lambda found: found[0][0] == 0, source._records((0, 0, 0)))
        firsts += [record.key for _, record in records]
    assert len(firsts) == len(set(firsts)) == 16
    for source in ranks:
        seen(source, source.len_epoch)
        assert (source.epoch, source.batches_left) == (0, 0)
        assert source.next_batch().epoch == 1


def test_the_epoch_is_counted_from_the_metadata(mixed):
    from sana.data.webdataset import SanaWebDataset

    with pytest.raises(DataError, match=r"stream_samples.*or a wids-meta.json"):
        loader(mixed, samples=None)
    SanaWebDataset(data_dir=str(mixed), image_size=16)  # writes the metadata
    assert loader(mixed, samples=None).len_epoch == 8
    with pytest.raises(DataError, match="16 samples an epoch do not fill one batch of 20"):
        loader(mixed, 20, samples=None)


def test_broken_records_are_left_out_within_a_budget(mixed):
    members = [("a.png", b"no picture"), ("a.json", description("a", 128, 128)), ("b.json", b"{"), ("b.png", picture())]
    (mixed / "000009.tar").write_bytes(tar_bytes(members))
    source = loader(mixed, broken_budget=2)
    given = keys(seen(source, 30))
    assert not {"000009/a", "000009/b"} & set(given)
    assert source.state_dict()["broken"] == ["000009/a", "000009/b"]
    with pytest.raises(DataError, match="2 records or shards are broken, more than data.extra.broken_budget=1"):
        seen(loader(mixed, broken_budget=1), 30)


def test_nothing_to_read_ends_instead_of_turning_for_ever(tmp_path):
    (tmp_path / "s.tar").write_bytes(tar_bytes([("a.txt", b"no image")]))
    with pytest.raises(DataError, match="no record in a pass"):
        loader(tmp_path).next_batch()


def test_other_shards_and_damaged_places_are_refused(mixed, tmp_path):
    source = loader(mixed)
    state = source.state_dict()
    write_shards(tmp_path / "other", 4)
    with pytest.raises(DataError, match="its fingerprint is"):
        loader(tmp_path / "other").load_state_dict(state)
    with pytest.raises(DataError, match="its seed is"):
        loader(mixed, seed=3).load_state_dict(state)
    with pytest.raises(DataError, match="damaged"):
        source.load_state_dict({**state, "next": (0, -1, 0)})


def test_another_number_of_ranks_begins_another_pass(mixed):
    one = loader(mixed, 1)
    seen(one, 20)
    two = [loader(mixed, 1, rank=rank, world_size=2) for rank in range(2)]
    for source in two:
        source.load_state_dict(one.state_dict())
        assert (source.epoch, source.batches_left) == (1, 6)
    given = [keys(seen(source, 4)) for source in two]
    assert len({*given[0], *given[1]}) == 8


def test_captions_beside_the_shards_wait_in_half_filled_buckets_and_are_found_again(mixed):
    for shard, count, start in ((0, 3, 0), (2, 2, 8)):
        said = {f"{number:04d}": {"one": f"beside {number}"} for number in range(start, start + count)}
        (mixed / f"{shard:06d}_VLM.json").write_text(json.dumps(said))
        (mixed / f"{shard:06d}_score.json").write_text(json.dumps({name: {"one": 50} for name in said}))

    def fresh():
        records = RecordOptions(image_size=128, aspect_ratio_type="ASPECT_RATIO_256", clip_thr=30.0)
        shards = StreamedShards(
            str(mixed), records, seed=3, external_caption_suffixes=["_VLM"], external_clipscore_suffixes=["_score"]
        )
        return StreamLoader(shards, 2, samples=16)

    whole = seen(fresh(), 16)
    for key, caption in ((key, caption) for b in whole for key, caption in zip(b.keys, b.captions, strict=True)):
        shard, _, number = key.partition("/")
        assert caption == f"{'beside' if shard in ('000000', '000002') else 'caption'} {int(number)}"
    for taken in (1, 5, 9):
        first, again = fresh(), fresh()
        seen(first, taken)
        again.load_state_dict(first.state_dict())
        assert_same(seen(again, 16 - taken), whole[taken:])


def test_the_web_is_streamed_and_resuming_asks_only_for_what_it_needs(mixed):
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(mixed)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        place = f"http://127.0.0.1:{server.server_port}/{{000000..000003}}.tar"
        source = loader(place, num_workers=1)
        given = seen(source, 12)
        state = source.state_dict()
        source.close()
        assert_same(given, seen(loader(mixed), 12))
        assert sorted(asked[:4]) == [f"/00000{number}.tar" for number in range(4)]
        asked.clear()
        resumed = loader(place)
        resumed.load_state_dict(state)
        resumed.next_batch()
        assert len(asked) <= len(SIZES) + 2  # the shards of waiting records, and what is read on
        resumed.close()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
