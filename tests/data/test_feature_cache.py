"""Cached features come back as they went in, in any process, and a stale or damaged cache is refused."""

import json
import multiprocessing
import os
import pickle
import signal
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sana.data.feature_cache import FeatureCache, image_hash, read_identities, text_hash
from sana.data.feature_writer import FeatureWriter
from sana.data.sample import BrokenSampleError, DataError

IDENTITIES = {"latents": {"weights": "a1", "image_size": 64}, "text": {"chi_prompt": "Draw.", "weights": "b2"}}


def add(writer: FeatureWriter, key: str, image: bytes, captions: dict[str, int], fill: float = 1.0) -> None:
    """Adds a sample; a caption of n tokens has features n."""
    writer.add_latents(key, image_hash(image), "1.0", torch.full((4, 2, 3), fill))
    for caption, length in captions.items():
        mask = torch.tensor([1] * length + [0] * (8 - length))
        writer.add_text(caption, torch.full((8, 5), float(length)), mask)
    writer.add_captions(key, list(captions))
    writer.end_sample()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with FeatureWriter(tmp_path / "features", IDENTITIES) as writer:
        add(writer, "one", b"image one", {"a cat": 3, "ein Kater": 5}, fill=0.5)
        add(writer, "two", b"image two", {"苹果": 8}, fill=-2.0)
        writer.add_broken("three", "the image is empty")
    return tmp_path / "features"


def test_features_come_back(folder: Path) -> None:
    cache = FeatureCache(folder)
    found = cache.get("two", vae=True, text=True)
    assert found["latents"].dtype == torch.float16
    assert torch.equal(found["latents"], torch.full((4, 2, 3), -2.0, dtype=torch.float16))
    assert torch.equal(found["prompt_embeds"].float(), torch.full((8, 5), 8.0))
    assert found["prompt_mask"].tolist() == [1] * 8
    assert found["prompt_mask"].dtype == torch.int64
    assert set(cache.get("two", vae=True, text=False)) == {"latents"}
    assert "two" in cache
    assert "three" not in cache


def test_every_caption_has_its_features_trimmed_to_its_tokens(folder: Path) -> None:
    cache = FeatureCache(folder)
    assert cache.get("one", vae=False, text=True)["prompt_embeds"].shape == (3, 5)
    assert cache.get("one", vae=False, text=True, caption="a cat")["prompt_mask"].shape == (3,)
    assert (cache.get("one", vae=False, text=True, caption="ein Kater")["prompt_embeds"] == 5).all()


def test_the_stored_dtypes_are_as_asked(tmp_path: Path) -> None:
    values = torch.randn(4, 2, 3)
    for name in ("float16", "bfloat16", "float32"):
        dtype = getattr(torch, name)
        with FeatureWriter(tmp_path / name, IDENTITIES, latents_dtype=dtype, text_dtype=dtype) as writer:
            writer.add_latents("k", "0", "1.0", values)
            writer.add_text("c", values[0], torch.ones(2))
            writer.add_captions("k", ["c"])
        found = FeatureCache(tmp_path / name).get("k", vae=True, text=True)
        assert torch.equal(found["latents"], values.to(dtype))
        assert torch.equal(found["prompt_embeds"], values[0].to(dtype))


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 3), st.integers(1, 8)), max_size=20), st.integers(1, 5)
)
def test_readers_see_what_was_added_last(tmp_path_factory, additions, shard_samples) -> None:
    """Whatever the size of the shards, the order of additions and the repeated keys, contents and captions."""
    folder, last = tmp_path_factory.mktemp("cache"), {}
    for start in range(0, len(additions), 7):  # several runs
        with FeatureWriter(folder, IDENTITIES, shard_samples=shard_samples) as writer:
            for key, content, length in additions[start : start + 7]:
                add(writer, key, bytes([content]), {f"caption {length}": length}, fill=float(content))
                last[key] = (content, length)
    if not additions:
        return
    cache = FeatureCache(folder)
    assert len(cache) == len(last)
    for key, (content, length) in last.items():
        found = cache.get(key, vae=True, text=True)
        assert (found["latents"] == content).all()
        assert found["prompt_embeds"].shape == (length, 5)
        cache.verify(key, bytes([content]), f"caption {length}", bucket="1.0")


def test_equal_contents_are_stored_once(tmp_path: Path) -> None:
    with FeatureWriter(tmp_path, IDENTITIES) as writer:
        add(writer, "one", b"same", {"a cat": 3})
        assert writer.holds(writer.latents_name(image_hash(b"same"), "1.0"))
        assert not writer.holds(writer.latents_name(image_hash(b"same"), "0.5"))
        writer.add_latents("two", image_hash(b"same"), "1.0", None)
        writer.add_captions("two", ["a cat"])
    names = [name for file in tmp_path.glob("shards/*.json") for name in json.loads(file.read_text())["names"]]
    assert len(names) == 2
    assert torch.equal(
        FeatureCache(tmp_path).get("two", vae=True, text=False)["latents"],
        FeatureCache(tmp_path).get("one", vae=True, text=False)["latents"],
    )


def test_a_changed_image_or_caption_is_refused(folder: Path) -> None:
    cache = FeatureCache(folder)
    cache.verify("one", b"image one", "ein Kater", bucket="1.0")
    command = r"run python tools/cache_features.py CONFIG --feature_dir=\S+\.$"
    with pytest.raises(DataError, match=f"features of one in .* are stale: its image file has changed.*{command}"):
        cache.verify("one", b"another image")
    with pytest.raises(DataError, match=f"stale: the caption 'a dog' was not among its captions.*{command}"):
        cache.verify("one", caption="a dog")
    with pytest.raises(DataError, match="stale: the caption '苹果'"):  # of another sample
        cache.get("one", vae=False, text=True, caption="苹果")
    with pytest.raises(DataError, match="bucket 1.0, and the image is now in 0.5"):
        cache.verify("one", bucket="0.5")
    with pytest.raises(DataError, match=f"four is not among the 3 samples.*{command}"):
        cache.get("four", vae=True, text=False)


def test_a_sample_that_was_broken_is_broken_again(folder: Path) -> None:
    with pytest.raises(BrokenSampleError) as raised:
        FeatureCache(folder).get("three", vae=True, text=False)
    assert (raised.value.key, raised.value.reason) == ("three", "the image is empty")
    with FeatureWriter(folder, IDENTITIES) as writer:
        add(writer, "three", b"mended", {"a cat": 3})
    assert FeatureCache(folder).get("three", vae=True, text=False)["latents"].shape == (4, 2, 3)


def test_other_networks_are_refused(folder: Path) -> None:
    cache = FeatureCache(folder)
    cache.require(IDENTITIES)
    cache.require({"latents": {"image_size": 64}})
    with pytest.raises(DataError, match="cached latents in .* stale: image_size was 64 and is now 128; delete"):
        cache.require({"latents": {"weights": "a1", "image_size": 128}})
    with pytest.raises(DataError, match="cached text in .* stale: chi_prompt was 'Draw.' and is now ''"):
        FeatureWriter(folder, {"text": {"chi_prompt": "", "weights": "b2"}})
    assert text_hash("a cat", IDENTITIES["text"]) != text_hash("a cat", {"chi_prompt": "", "weights": "b2"})


def test_kinds_can_be_added_later(tmp_path: Path) -> None:
    with FeatureWriter(tmp_path, {"latents": IDENTITIES["latents"]}) as writer:
        writer.add_latents("one", "0", "1.0", torch.ones(4, 2, 3))
    with pytest.raises(DataError, match="holds no cached text"):
        FeatureCache(tmp_path).require(IDENTITIES)
    with pytest.raises(DataError, match="text features of one are not in"):
        FeatureCache(tmp_path).get("one", vae=False, text=True)
    with FeatureWriter(tmp_path, {"text": IDENTITIES["text"]}) as writer:
        writer.add_text("a cat", torch.ones(3, 5), torch.ones(3))
        writer.add_captions("one", ["a cat"])
    assert set(FeatureCache(tmp_path).get("one", vae=True, text=True)) == {"latents", "prompt_embeds", "prompt_mask"}
    assert read_identities(tmp_path) == IDENTITIES


def test_no_cache_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no cached features .*: run python tools/cache_features.py"):
        FeatureCache(tmp_path / "nothing")


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', '{"format": 1, "identities": [1]}'])
def test_a_damaged_description_is_named(folder: Path, text: str) -> None:
    (folder / "feature_cache.json").write_text(text)
    with pytest.raises(DataError, match="feature_cache.json is damaged"):
        FeatureCache(folder)


def test_a_later_format_is_named(folder: Path) -> None:
    (folder / "feature_cache.json").write_text('{"format": 9, "identities": {}}')
    with pytest.raises(DataError, match="has format 9, and this program reads 1"):
        FeatureCache(folder)


@pytest.mark.parametrize("damage", ["truncated", "missing", "index"])
def test_a_damaged_shard_is_refused_by_readers_and_made_again_by_writers(folder: Path, damage: str) -> None:
    (shard,) = (folder / "shards").glob("*.safetensors")
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-7])
    elif damage == "missing":
        shard.unlink()
    else:
        shard.with_suffix(".json").write_text("{")
    with pytest.raises(DataError, match="does not fit its index"):
        FeatureCache(folder)
    with FeatureWriter(folder, IDENTITIES) as writer:
        assert len(writer.cache) == 0
        add(writer, "one", b"image one", {"a cat": 3})
    assert len(FeatureCache(folder)) == 1


def test_an_unfinished_shard_does_not_count(folder: Path) -> None:
    (folder / "shards" / ".00000002-00000-abcdef.safetensors.12345678.part").write_bytes(b"half")
    (folder / "shards" / "00000002-00000-abcdef.safetensors").write_bytes(b"whole, but its index was not written")
    assert len(FeatureCache(folder)) == 3
    FeatureWriter(folder, IDENTITIES)
    assert not list((folder / "shards").glob(".*"))


def test_a_full_disk_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"part of it")
        raise OSError(28, "No space left on device")

    before = sorted(path.name for path in (folder / "shards").iterdir())
    monkeypatch.setattr("sana.data.feature_writer.save_file", full)
    with pytest.raises(OSError, match="No space left"), FeatureWriter(folder, IDENTITIES) as writer:
        add(writer, "four", b"4", {"a cat": 3})
    assert sorted(path.name for path in (folder / "shards").iterdir()) == before


def write_and_be_killed(folder: Path, moment: int) -> None:
    """Writes two shards; SIGKILL at the file operation number `moment`. Runs in a child process."""
    count = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal count
        if event in ("open", "os.rename", "os.remove") and str(folder) in str(arguments[0]):
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    with FeatureWriter(folder, {"latents": {"a": 1}}, shard_samples=1) as writer:
        for number in range(2):
            writer.add_latents(str(number), str(number), "1.0", torch.full((1, 2, 2), float(number)))
            writer.end_sample()


def test_a_process_killed_at_any_moment_leaves_a_readable_cache(tmp_path: Path) -> None:
    for moment in range(1, 1000, 2):
        folder = tmp_path / f"features{moment}"
        child = multiprocessing.get_context("fork").Process(target=write_and_be_killed, args=(folder, moment))
        child.start()
        child.join()
        if read_identities(folder):
            cache = FeatureCache(folder)
            for key in filter(cache.__contains__, "012"):
                assert (cache.get(key, vae=True, text=False)["latents"] == float(key)).all()
        with FeatureWriter(folder, {"latents": {"a": 1}}) as writer:
            for key in "012":
                writer.add_latents(key, key, "1.0", torch.full((1, 2, 2), float(key)))
        assert len(FeatureCache(folder)) == 3
        if child.exitcode == 0:  # there are fewer operations than that
            break
        assert child.exitcode == -signal.SIGKILL
    assert moment > 9


def test_workers_read_the_same(folder: Path) -> None:
    cache = FeatureCache(folder)
    here = cache.get("one", vae=True, text=True)  # opens the shard in this process first
    loader = torch.utils.data.DataLoader(_Features(cache), batch_size=None, num_workers=2)
    for found in loader:
        assert all(torch.equal(found[name], here[name]) for name in here)
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(again.get("one", vae=True, text=False)["latents"], here["latents"])


class _Features(torch.utils.data.Dataset):
    def __init__(self, cache: FeatureCache) -> None:
        self.cache, self.parent = cache, os.getpid()

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        assert os.getpid() != self.parent
        return self.cache.get("one", vae=True, text=True)


def test_two_ranks_share_a_folder(tmp_path: Path) -> None:
    first, second = FeatureWriter(tmp_path, IDENTITIES, rank=0), FeatureWriter(tmp_path, IDENTITIES, rank=1)
    add(first, "one", b"1", {"a cat": 3}, fill=1.0)
    add(second, "two", b"2", {"a cat": 3, "a dog": 4}, fill=2.0)
    second.flush()
    first.flush()
    cache = FeatureCache(tmp_path)
    assert (cache.get("one", vae=True, text=True)["latents"] == 1).all()
    assert cache.get("two", vae=True, text=True, caption="a dog")["prompt_embeds"].shape == (4, 5)
