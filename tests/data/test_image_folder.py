"""The image-folder data set: which files count, what a sample holds, and every broken thing beside an image."""

import json
import logging
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sana.data.aspect_ratio import ASPECT_RATIOS
from sana.data.feature_cache import image_hash
from sana.data.feature_writer import FeatureWriter
from sana.data.image_folder import SanaImgDataset
from sana.data.sample import BrokenSampleError, DataError, Dataset
from sana.data.transforms import bucket_transform, default_train

EXAMPLE = Path(__file__).parents[2] / "asset/example_data"


def add(folder: Path, name: str, caption: str | None = "a caption", size: tuple[int, int] = (20, 20)) -> Path:
    """Writes a noisy image of (width, height) and, unless None, its caption."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(name)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    return path


def folder_of(data_dir, **options) -> SanaImgDataset:
    return SanaImgDataset(**{"data_dir": data_dir, "image_size": 16, **options})


def keys(dataset: Dataset) -> list[str]:
    return [dataset.key(index) for index in range(len(dataset))]


def load(dataset: Dataset, index: int = 0, seed: int = 0):
    return dataset.load(index, random.Random(seed))


def test_a_folder_of_pictures_and_texts_is_enough(tmp_path) -> None:
    path = add(tmp_path, "a.png", "a red shape\nnot this line", (40, 20))
    dataset: Dataset = folder_of(str(tmp_path))
    sample = load(dataset)
    assert (sample.key, sample.caption, sample.caption_type, sample.clip_score) == (
        "a.png",
        "a red shape",
        "prompt",
        "",
    )
    assert (sample.image == default_train(Image.open(path), 16)).all()
    assert dataset.buckets() == ["1.0"]
    assert load(folder_of(tmp_path, caption_lines="all")).caption == "a red shape\nnot this line"


def test_several_folders_in_their_order_or_sorted(tmp_path) -> None:
    for name in ("second/a.png", "second/c.png", "first/b.png", "first/c.png"):
        add(tmp_path, name)
    folders = [str(tmp_path / "second"), str(tmp_path / "first")]
    dataset = folder_of(folders)
    assert keys(dataset) == ["a.png", "c.png", "b.png", "1:c.png"]
    assert keys(folder_of(folders, sort_dataset=True)) == ["1:c.png", "a.png", "b.png", "c.png"]
    assert dataset.fingerprint() == folder_of(folders).fingerprint()
    assert dataset.fingerprint() != folder_of(folders[::-1]).fingerprint()


def test_captions_and_scores_of_captioners(tmp_path) -> None:
    add(tmp_path, "a.png", "own")
    (tmp_path / "a_V.json").write_text(json.dumps({"a": {"V": "long", "short": "s"}, "b": {"V": "other"}}))
    (tmp_path / "a_V_clip_score.json").write_text(json.dumps({"a": {"V": "30.5", "short": 1, "gone": 99}}))
    (tmp_path / "a_own_clip_score.json").write_text(json.dumps({"a": {"prompt": 20}}))
    options = {"external_caption_suffixes": ["_V"], "external_clipscore_suffixes": ["_V_clip_score", "_own_clip_score"]}
    dataset = folder_of(tmp_path, **options, clip_thr=10)
    assert dataset.captions(0) == ["own", "long", "s"]
    drawn = {load(dataset, seed=seed).caption for seed in range(40)}
    assert drawn == {"own", "long"}
    sample = load(folder_of(tmp_path, **options, clip_thr=1000))
    assert (sample.caption, sample.caption_type, sample.clip_score) == ("long", "V", "30.5")
    assert load(folder_of(tmp_path)).caption == "own"


def test_the_listed_caption_goes_before_the_text(tmp_path) -> None:
    add(tmp_path, "a.png", "text")
    (tmp_path / "meta_data.json").write_text('[{"img": "a.png", "prompt": "listed"}]')
    assert load(folder_of(tmp_path)).caption == "listed"


def test_the_same_generator_gives_the_same_sample() -> None:
    options = {
        "external_caption_suffixes": ["_VILA1-5-13B"],
        "external_clipscore_suffixes": ["_VILA1-5-13B_clip_score", "_prompt_clip_score"],
    }
    dataset = folder_of(EXAMPLE, **options)
    copy = pickle.loads(pickle.dumps(dataset))
    for seed in range(5):
        first, second = load(dataset, 0, seed), load(copy, 0, seed)
        assert first.caption == second.caption
        assert (first.image == second.image).all()


def test_a_captioners_file_alone_is_a_caption(tmp_path) -> None:
    add(tmp_path, "a.png", None)
    (tmp_path / "a_V.json").write_text(json.dumps({"a": {"V": "long"}}))
    sample = load(folder_of(tmp_path, external_caption_suffixes=["_V"]))
    assert (sample.caption, sample.caption_type) == ("long", "V")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.txt", b" \n", "its caption is empty"),
        ("a.txt", b"\xff\xfe", "its text file cannot be read"),
        ("a_V.json", b"{", "not readable JSON"),
        ("a_V.json", b'{"a": {"V": 3}}', "not a text"),
        ("a_V_clip_score.json", b'{"a": {"V": "x"}}', "not a number"),
        ("a.png", b"", "the image is empty"),
        ("a.png", b"\x89PNG\r\n\x1a\n", "the image cannot be read"),
    ],
)
def test_broken_files_are_broken_samples_with_their_key(tmp_path, file: str, content: bytes, message: str) -> None:
    add(tmp_path, "sub/a.png")
    (tmp_path / "sub" / file).write_bytes(content)
    dataset = folder_of(
        tmp_path, external_caption_suffixes=["_V"], external_clipscore_suffixes=["_V_clip_score"]
    )  # fmt: skip
    with pytest.raises(BrokenSampleError, match=message) as caught:
        load(dataset)
    assert caught.value.key == "sub/a.png"


def test_a_file_that_vanished_or_is_too_large_is_broken(tmp_path) -> None:
    path = add(tmp_path, "a.png")
    with pytest.raises(BrokenSampleError, match="20 x 20 pixels, more than the 399"):
        load(folder_of(tmp_path, max_pixels=399))
    dataset = folder_of(tmp_path)
    path.unlink()
    with pytest.raises(BrokenSampleError, match=r"a\.png"):
        load(dataset)


def multi_scale(data_dir, **options) -> SanaImgDataset:
    return folder_of(data_dir, multi_scale=True, aspect_ratio_type="ASPECT_RATIO_256", **options)


def test_every_image_gets_the_size_of_its_bucket() -> None:
    dataset = multi_scale(EXAMPLE)
    table = ASPECT_RATIOS["ASPECT_RATIO_256"]
    for index, ratio in enumerate(dataset.buckets()):
        image = Image.open(EXAMPLE / dataset.key(index)).convert("RGB")
        assert abs(float(ratio) - image.height / image.width) == min(
            abs(float(other) - image.height / image.width) for other in table
        )
        expected = bucket_transform(image, *table[ratio], "ASPECT_RATIO_256")
        assert (load(dataset, index).image == expected).all()
        assert (load(multi_scale(EXAMPLE), index).image == expected).all()  # buckets never asked for
    assert len(set(dataset.buckets())) >= 3


def test_a_turned_photograph_is_in_the_bucket_it_is_loaded_for(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = add(tmp_path, "a.jpg", size=(64, 32))
    Image.open(path).save(path, exif=exif)
    dataset = multi_scale(tmp_path)
    assert dataset.buckets() == ["2.0"]
    assert load(dataset).image.shape == (3, *ASPECT_RATIOS["ASPECT_RATIO_256"]["2.0"])


def test_unreadable_headers_go_with_the_most_usual_bucket_and_break_on_loading(tmp_path, caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("sana"), "propagate", True)  # setup_logging switches it off
    for name in ("a.png", "b.png"):
        add(tmp_path, name, size=(40, 20))
    add(tmp_path, "c.png", size=(20, 20))
    add(tmp_path, "d.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    dataset = multi_scale(tmp_path)
    with caplog.at_level(logging.WARNING, "sana"):
        assert dataset.buckets() == ["0.5", "0.5", "1.0", "0.5"]
        dataset.buckets()
    assert len(caplog.records) == 1 and "1 of 4 images cannot be read, among them d.png" in caplog.text
    with pytest.raises(BrokenSampleError, match=r"d\.png"):
        load(dataset, 3)


def test_no_readable_image_is_an_error(tmp_path) -> None:
    add(tmp_path, "a.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"None of the 1 images can be read; the first: a\.png"):
        multi_scale(tmp_path).buckets()


def test_a_bucket_stays_what_it_was_announced_as(tmp_path) -> None:
    add(tmp_path, "a.png", size=(40, 20))
    dataset = multi_scale(tmp_path)
    dataset.buckets()
    add(tmp_path, "a.png", size=(20, 40))
    assert load(dataset).image.shape == (3, *ASPECT_RATIOS["ASPECT_RATIO_256"]["0.5"])


def test_features_beside_the_image(tmp_path) -> None:
    add(tmp_path, "a.png")
    latents = np.random.default_rng(0).standard_normal((4, 2, 2)).astype(np.float16)
    features = np.random.default_rng(0).standard_normal((1, 6, 3)).astype(np.float32)
    np.save(tmp_path / "a.npy", latents)
    np.savez(tmp_path / "a.npz", caption_feature=features, attention_mask=np.array([[1, 1, 1, 1, 0, 0]]))
    sample = load(folder_of(tmp_path, load_vae_feat=True, load_text_feat=True))
    assert sample.image is None and sample.caption == "a caption"
    assert sample.latents.dtype == torch.float32 and (sample.latents.numpy() == latents).all()
    assert (sample.prompt_embeds.numpy() == features[0, :4]).all()
    assert sample.prompt_mask.tolist() == [1, 1, 1, 1] and sample.prompt_mask.dtype == torch.int64
    sample = load(folder_of(tmp_path, load_text_feat=True))
    assert sample.latents is None and sample.image.shape == (3, 16, 16)


def test_features_that_cannot_be_used(tmp_path) -> None:
    add(tmp_path, "a.png", size=(40, 20))
    dataset = folder_of(tmp_path, load_vae_feat=True)
    with pytest.raises(DataError, match=r"load_vae_feat is set, but .*a\.npy is missing.*cache_features"):
        load(dataset)
    np.save(tmp_path / "a.npy", np.zeros((4, 2, 4), np.float32))
    with pytest.raises(BrokenSampleError, match=r"shape \(4, 2, 4\), which is no image of 16 x 16"):
        load(dataset)
    assert load(multi_scale(tmp_path, load_vae_feat=True)).latents.shape == (4, 2, 4)  # 0.5: 176 x 352
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(BrokenSampleError, match="its latents"):
        load(dataset)
    for arrays, message in (
        ({"other": np.zeros(3)}, "no caption_feature"),
        ({"caption_feature": np.zeros((1, 3, 2)), "attention_mask": np.ones(4)}, "3 tokens"),
        ({"caption_feature": np.zeros((1, 3, 2)), "attention_mask": np.zeros(3)}, "mask 0"),
    ):
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(BrokenSampleError, match=message):
            load(folder_of(tmp_path, load_text_feat=True))
    (tmp_path / "a.npz").write_bytes(b"PK")
    with pytest.raises(BrokenSampleError, match="its text features"):
        load(folder_of(tmp_path, load_text_feat=True))


def test_features_of_a_cache(tmp_path) -> None:
    path = add(tmp_path / "data", "a.png", size=(40, 20))
    latents = torch.arange(32.0).reshape(4, 2, 4)
    with FeatureWriter(tmp_path / "features", {"latents": {}, "text": {}}) as writer:
        writer.add_latents("a.png", image_hash(path.read_bytes()), "0.5", latents)
        writer.add_text("a caption", torch.ones(8, 5), torch.tensor([1] * 3 + [0] * 5))
        writer.add_captions("a.png", ["a caption"])
    options = {"load_vae_feat": True, "load_text_feat": True, "feature_dir": str(tmp_path / "features")}
    dataset = multi_scale(tmp_path / "data", **options)
    sample = load(pickle.loads(pickle.dumps(dataset)))
    assert sample.image is None and (sample.latents == latents).all()
    assert sample.prompt_embeds.shape == (3, 5) and sample.prompt_mask.tolist() == [1, 1, 1]
    with pytest.raises(DataError, match="made for the bucket 0.5, and the image is now in 1.0"):
        load(folder_of(tmp_path / "data", **options))
    path.with_suffix(".txt").write_text("another caption")
    with pytest.raises(DataError, match="stale: the caption 'another caption'"):
        load(dataset)
    path.with_suffix(".txt").write_text("a caption")
    add(tmp_path / "data", "a.png", size=(42, 21))
    assert load(multi_scale(tmp_path / "data", load_text_feat=True, feature_dir=options["feature_dir"]))
    with pytest.raises(DataError, match="its image file has changed since"):
        load(multi_scale(tmp_path / "data", **options))
    add(tmp_path / "data", "b.png")
    with pytest.raises(DataError, match=r"b\.png is not among the 1 samples"):
        load(multi_scale(tmp_path / "data", **options), 1)


def test_arguments_that_make_no_sense_are_refused() -> None:
    for options, message in (
        ({"caption_lines": "second"}, "choose one of first, all"),
        ({"transform": "default"}, "default_train"),
        ({"multi_scale": True, "aspect_ratio_type": "ASPECT_RATIO_3"}, "ASPECT_RATIO_1024"),
        ({"feature_dir": "features"}, "neither load_vae_feat nor load_text_feat"),
    ):
        with pytest.raises(ValueError, match=message):
            folder_of(EXAMPLE, **options)


def test_the_fast_reader_gives_nearly_the_same_pictures() -> None:
    options = {"data_dir": EXAMPLE, "multi_scale": True, "aspect_ratio_type": "ASPECT_RATIO_256"}
    exact, fast = SanaImgDataset(**options), SanaImgDataset(**options, resize="fast")
    for index in range(len(exact)):
        one, other = load(exact, index).image, load(fast, index).image
        assert one.shape == other.shape and one.dtype == other.dtype == torch.uint8
        assert (one.int() - other.int()).abs().max() <= 2
    with pytest.raises(ValueError, match="resize is 'slow'"):
        SanaImgDataset(**options, resize="slow")
