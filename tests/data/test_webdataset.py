"""The data set of tar shards: its records, buckets, captions and features, and what is wrong with bad ones."""

import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from sana.data import DATASETS
from sana.data.aspect_ratio import ASPECT_RATIOS
from sana.data.feature_cache import image_hash
from sana.data.feature_writer import FeatureWriter
from sana.data.image_folder import SanaImgDataset
from sana.data.loader import TrainingLoader
from sana.data.sample import BrokenSampleError, DataError
from sana.data.webdataset import SanaWebDataset, SanaWebDatasetMS
from tests.data.tars import description, npy, npz, picture, records, tar_bytes, write_shards

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "asset" / "example_data_tar"
CAPTIONS = ("_VILA1-5-13B", "_InternVL2-26B")
SCORES = ("_VILA1-5-13B_clip_score", "_InternVL2-26B_clip_score", "_prompt_clip_score")


def dataset(folder, members=None, **options):
    if members is not None:
        folder.mkdir(exist_ok=True)
        (folder / "s.tar").write_bytes(tar_bytes(members))
    return SanaWebDatasetMS(data_dir=str(folder), **({"aspect_ratio_type": "ASPECT_RATIO_256"} | options))


def load(data, index=0, seed=0):
    return data.load(index, random.Random(seed))


def test_records_of_several_shards_come_in_order(tmp_path):
    write_shards(tmp_path, 2, 3, 1)
    data = dataset(tmp_path)
    assert [data.key(index) for index in range(len(data))] == [
        "000000/0000", "000000/0001", "000001/0002", "000001/0003", "000001/0004", "000002/0005",
    ]  # fmt: skip
    for index in (5, 0, 3):
        sample = load(data, index)
        assert (sample.key, sample.caption) == (data.key(index), f"caption {index}")
        assert sample.image.dtype == torch.uint8 and (sample.image == index).all()
    for outside in (-1, 6):
        with pytest.raises(IndexError):
            data.key(outside)


def test_the_registered_classes_differ_in_multi_scale(tmp_path):
    write_shards(tmp_path, 1)
    fixed = DATASETS["SanaWebDataset"](data_dir=str(tmp_path), image_size=64)
    assert fixed.buckets() == ["1.0"]
    assert load(fixed).image.shape == (3, 64, 64)
    scaled = DATASETS["SanaWebDatasetMS"](data_dir=str(tmp_path), aspect_ratio_type="ASPECT_RATIO_256")
    assert scaled.buckets() == ["0.68"]  # 8 x 12 pixels
    assert load(scaled).image.shape == (3, *ASPECT_RATIOS["ASPECT_RATIO_256"]["0.68"])
    square = SanaWebDatasetMS(data_dir=str(tmp_path), image_size=32, multi_scale=False)
    assert load(square).image.shape == (3, 32, 32)


def test_a_record_of_unknown_size_is_in_the_usual_bucket_and_broken(tmp_path):
    data = dataset(tmp_path, [*records(2), ("bad.png", b"no picture"), ("bad.txt", b"text")])
    assert data.buckets() == ["0.68"] * 3
    with pytest.raises(BrokenSampleError, match="s/bad: the image is not a PNG") as caught:
        load(data, 2)
    assert caught.value.key == "s/bad"


def test_the_metadata_is_made_where_it_is_missing(tmp_path):
    write_shards(tmp_path, 2, 1)
    before = dataset(tmp_path)
    assert json.loads((tmp_path / "wids-meta.json").read_text())["shardlist"][0]["nsamples"] == 2
    after = dataset(tmp_path)
    assert after.fingerprint() == before.fingerprint()


def test_the_fingerprint_knows_shards_keys_and_order(tmp_path):
    write_shards(tmp_path / "a", 2, 1)
    write_shards(tmp_path / "b", 1, 2)
    prints = [dataset(tmp_path / name).fingerprint() for name in "ab"]
    (tmp_path / "a" / "000001.tar").write_bytes(tar_bytes(records(1, start=7)))
    (tmp_path / "a" / "wids-meta.json").unlink()
    assert len({*prints, dataset(tmp_path / "a").fingerprint()}) == 3


def test_the_whole_data_set_crosses_to_a_worker(tmp_path):
    write_shards(tmp_path, 2)
    data = dataset(tmp_path)
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(load(copy, 1).image, load(data, 1).image)


def test_captions_of_the_text_member_and_of_the_description(tmp_path):
    members = [
        ("a.png", picture()), ("a.txt", b"first\nsecond"),
        ("b.png", picture()), ("b.txt", b"text"), ("b.json", description("prompt\nin full")),
        ("c.png", picture()), ("c.json", description(None)),
        ("d.png", picture()), ("d.json", b"{"),
        ("e.png", picture()), ("e.json", description(["a list"])),
    ]  # fmt: skip
    data = dataset(tmp_path, members)
    assert [data.captions(0), data.captions(1)] == [["first"], ["prompt\nin full"]]
    assert dataset(tmp_path, caption_lines="all").captions(0) == ["first\nsecond"]
    for index, complaint in ((2, "s/c: it has no caption"), (3, "s/d: its .json is damaged"), (4, "s/e: the prompt")):
        with pytest.raises(BrokenSampleError, match=complaint):
            load(data, index)


def test_files_beside_the_shard_bring_captions_and_scores(tmp_path):
    write_shards(tmp_path, 3)
    (tmp_path / "000000_VLM.json").write_text(json.dumps({"0000": {"VLM": "by a model"}, "0002": {"VLM": "third"}}))
    scores = {"0000": {"VLM": "30.5", "prompt": 10}, "0001": {"VLM": 99, "prompt": 5}}
    (tmp_path / "000000_VLM_clip_score.json").write_text(json.dumps(scores))
    options = {"external_caption_suffixes": ["_VLM"], "external_clipscore_suffixes": ["_VLM_clip_score", "_none"]}
    data = dataset(tmp_path, clip_thr=20.0, **options)
    chosen = [load(data, index) for index in range(3)]
    assert [(s.caption, s.caption_type, s.clip_score) for s in chosen] == [
        ("by a model", "VLM", "30.5"),
        ("caption 1", "prompt", "5.0"),  # none reaches 20, and the score of a caption that is not there does not count
        ("caption 2", "prompt", ""),
    ]
    assert data.scored_captions(0) == ({"prompt": "caption 0", "VLM": "by a model"}, [("VLM", 30.5), ("prompt", 10.0)])
    small = dataset(tmp_path, image_size=8, multi_scale=False, **options)
    drawn = [load(small, 0, seed).caption_type for seed in range(300)]
    assert drawn.count("VLM") == pytest.approx(300 * 30.5 / 40.5, abs=4 * np.sqrt(300 * 0.25 * 0.75))


def test_a_damaged_file_beside_the_shard_stops_the_run(tmp_path):
    write_shards(tmp_path, 1)
    (tmp_path / "000000_VLM.json").write_text('{"0000": ')
    with pytest.raises(DataError, match=r"000000_VLM.json is not a readable JSON") as caught:
        load(dataset(tmp_path, external_caption_suffixes=["_VLM"]))
    assert not isinstance(caught.value, BrokenSampleError)


def latent_members(latents, **features):
    return [("a.json", description(width=256, height=256)), ("a.npy", npy(latents)), ("a.npz", npz(**features))]


def test_cached_features_come_from_the_members(tmp_path):
    latents = np.random.default_rng(0).normal(size=(32, 8, 8)).astype(np.float16)
    embeds = np.arange(20, dtype=np.float32).reshape(1, 5, 4)
    mask = np.array([[1, 0, 1, 0, 0]], np.int16)
    folder = tmp_path / "d"
    members = latent_members(latents, caption_feature=embeds, attention_mask=mask)
    sample = load(dataset(folder, members, load_vae_feat=True, load_text_feat=True))
    assert sample.image is None
    torch.testing.assert_close(sample.latents, torch.from_numpy(latents).float())
    torch.testing.assert_close(sample.prompt_embeds, torch.from_numpy(embeds[0, :3]))
    assert sample.prompt_mask.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("latents", "features", "complaint"),
    [
        (np.zeros((32, 8, 9), np.float32), {}, "s/a: its latents have shape .* no image of 256 x 256"),
        (np.full((32, 8, 8), np.nan, np.float32), {}, "s/a: its .npy, .*holds no finite"),
        (np.zeros((8, 8), np.float32), {}, "s/a: its .npy, of shape"),
        (np.array([{}], dtype=object), {}, "s/a: its .npy cannot be read: .*only numbers"),
        (np.zeros((32, 8, 8), np.float32), {"other": np.zeros(3)}, "s/a: its .npz holds no caption_feature"),
        (
            np.zeros((32, 8, 8), np.float32),
            {"caption_feature": np.zeros((1, 3, 4)), "attention_mask": np.ones((1, 4))},
            "s/a: its .npz has 3 tokens and a mask of 4",
        ),
    ],
)
def test_bad_features_are_broken_samples(tmp_path, latents, features, complaint):
    good = {"caption_feature": np.zeros((1, 3, 4), np.float32)}
    members = latent_members(latents, **(features or good))
    with pytest.raises(BrokenSampleError, match=complaint):
        load(dataset(tmp_path / "d", members, load_vae_feat=True, load_text_feat=True))


def test_an_option_that_the_shards_cannot_serve_is_an_error(tmp_path):
    write_shards(tmp_path / "images", 1)
    with pytest.raises(DataError, match=r"load_vae_feat is true, and no record .* has a .npy"):
        dataset(tmp_path / "images", load_vae_feat=True)
    with pytest.raises(DataError, match=r"load_text_feat is true, and no record .* has a .npz"):
        dataset(tmp_path / "images", load_text_feat=True)
    with pytest.raises(DataError, match=r"load_vae_feat is false, and no record .* has a .png/.jpg"):
        dataset(tmp_path / "latents", latent_members(np.zeros((32, 8, 8))))
    with pytest.raises(ValueError, match="feature_dir"):
        dataset(tmp_path / "images", feature_dir="somewhere")
    with pytest.raises(ValueError, match="aspect_ratio_type"):
        dataset(tmp_path / "images", aspect_ratio_type="ASPECT_RATIO_7")
    with pytest.raises(ValueError, match="caption_lines"):
        dataset(tmp_path / "images", caption_lines="second")


def test_a_truncated_shard_is_named_before_training(tmp_path):
    (path,) = write_shards(tmp_path, 3)
    content = path.read_bytes().rstrip(b"\0")
    path.write_bytes(content[:-20])
    with pytest.raises(DataError, match=r"000000.tar is cut off inside 0002.json"):
        dataset(tmp_path)


def test_an_image_with_too_many_pixels_is_broken(tmp_path):
    data = dataset(tmp_path, records(1), max_pixels=95)
    with pytest.raises(BrokenSampleError, match="12 x 8 pixels"):
        load(data)


def test_the_shipped_example_is_the_folder_it_was_made_of():
    options = {
        "image_size": 64, "external_caption_suffixes": CAPTIONS, "external_clipscore_suffixes": SCORES,
        "caption_lines": "all",
    }  # fmt: skip
    folder = SanaImgDataset(data_dir=str(ROOT / "asset" / "example_data"), **options)
    shards = SanaWebDataset(data_dir=str(EXAMPLE), **options)
    assert len(shards) == len(folder) > 0
    for index in range(len(folder)):
        one, other = folder.load(index, random.Random(index)), shards.load(index, random.Random(index))
        assert (one.caption, one.caption_type, one.clip_score) == (other.caption, other.caption_type, other.clip_score)
        assert torch.equal(one.image, other.image)
    assert sum(path.stat().st_size for path in EXAMPLE.iterdir()) < 500_000


def test_features_of_a_cache_are_those_of_the_caption_and_refused_when_stale(tmp_path):
    write_shards(tmp_path / "d", 2)
    data = dataset(tmp_path / "d")
    latents, embeds = torch.full((32, 4, 6), 0.5), torch.arange(6.0).reshape(3, 2)
    identities = {"latents": {"autoencoder": "a"}, "text": {"encoder": "b"}}
    with FeatureWriter(tmp_path / "features", identities, text_dtype=torch.float32) as writer:
        for index in range(2):
            writer.add_latents(data.key(index), image_hash(data.image_bytes(index)), data.buckets()[index], latents)
            writer.add_text(data.captions(index)[0], embeds + index, torch.ones(3, dtype=torch.int64))
            writer.add_captions(data.key(index), data.captions(index))
            writer.end_sample()
    options = {"load_vae_feat": True, "load_text_feat": True, "feature_dir": tmp_path / "features"}
    sample = load(dataset(tmp_path / "d", **options), 1)
    assert sample.image is None and torch.equal(sample.latents, latents)
    assert torch.equal(sample.prompt_embeds, embeds + 1)
    with pytest.raises(DataError, match="stale"):
        load(dataset(tmp_path / "d", **options | {"aspect_ratio_type": "ASPECT_RATIO_2880_TEST", "multi_scale": False}))
    changed = records(2)
    changed[0] = ("0000.png", picture(colour=(9, 9, 9)))
    (tmp_path / "d" / "000000.tar").write_bytes(tar_bytes(changed))
    with pytest.raises(DataError, match=r"000000/0000 .* are stale: its image file has changed"):
        load(dataset(tmp_path / "d", **options), 0)


def test_the_training_loader_takes_it_in_worker_processes(tmp_path):
    write_shards(tmp_path, 3, 3)
    (tmp_path / "zz.tar").write_bytes(tar_bytes([("bad.png", b"x"), ("bad.json", description())]))
    loader = TrainingLoader(dataset(tmp_path), 2, order="sequential", num_workers=1)
    try:
        batches = [loader.next_batch() for _ in range(4)]
    finally:
        loader.close()
    assert [key for batch in batches for key in batch.keys][:7] == [
        "000000/0000", "000000/0001", "000000/0002", "000001/0003", "000001/0004", "000001/0005", "zz/bad",
    ]  # fmt: skip
    assert [weight for batch in batches for weight in batch.weights.tolist()][:7] == [1, 1, 1, 1, 1, 1, 0]
