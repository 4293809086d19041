"""Cached features equal what training computes from images and captions; interrupted, changed and broken data."""

import json
import random
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sana.config import ConfigError
from sana.data.feature_cache import FeatureCache
from sana.data.sample import BrokenSampleError, DataError, Sample
from sana.data.transforms import normalise_images
from sana.models import build_autoencoder, build_text_encoder
from sana.models.autoencoder.base import Autoencoder
from sana.training import cache_features as module
from sana.training.build import build_dataset
from sana.training.cache_features import CacheOptions, cache_features
from sana.training.feature_identity import latents_identity, require_features, text_identity, weights_hash

SIZES = {"wide": (40, 100), "square": (70, 70), "tall": (120, 50), "more/square": (64, 66), "more/wide": (50, 130)}


def write_image(path: Path, seed: int, size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def config(tiny_config, tmp_path: Path):
    """The tiny configuration on a folder of five images with one or two captions each."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for seed, (name, size) in enumerate(SIZES.items()):
        write_image(folder / f"{name}.png", seed, size)
        (folder / f"{name}.txt").write_text(f"a red cat number {seed}")
    text = {"tall": {"VLM": "two owls on a blue background", "short": "owls"}}
    (folder / "tall_VLM.json").write_text(json.dumps(text))
    tiny_config.data.type, tiny_config.data.data_dir = "SanaImgDataset", [str(folder)]
    tiny_config.data.external_caption_suffixes = ["_VLM"]
    tiny_config.model.image_size = tiny_config.data.image_size = 256
    tiny_config.model.multi_scale = True
    return tiny_config


@pytest.fixture
def small(config):
    """The same with square images of 64 pixels, where sizes do not matter."""
    config.model.image_size, config.model.multi_scale = 64, False
    return config


def options(tmp_path: Path, **changed) -> CacheOptions:
    exact = {"latents_dtype": torch.float32, "text_dtype": torch.float32, "device": "cpu"}
    return CacheOptions(**{"feature_dir": tmp_path / "features", **exact, **changed})


def with_features(config, tmp_path: Path):
    config.data.load_vae_feat = config.data.load_text_feat = True
    config.data.extra = {"feature_dir": str(tmp_path / "features")}
    return config


def cached_dataset(config, tmp_path: Path):
    """The configuration's data set as training builds it to read the cache."""
    from sana.data import DATASETS

    return DATASETS[config.data.type](
        data_dir=config.data.data_dir,
        image_size=config.model.image_size,
        aspect_ratio_type=config.model.aspect_ratio_type,
        multi_scale=config.model.multi_scale,
        external_caption_suffixes=config.data.external_caption_suffixes,
        load_vae_feat=True,
        load_text_feat=True,
        feature_dir=str(tmp_path / "features"),
    )


@pytest.mark.parametrize("multi_scale", [True, False])
def test_a_batch_from_the_cache_equals_one_computed_in_training(config, tmp_path: Path, multi_scale: bool) -> None:
    config.model.multi_scale = multi_scale
    config.model.aspect_ratio_type = "ASPECT_RATIO_512"  # that of 256 has sizes that an f32 autoencoder cannot encode
    summary = cache_features(config, options(tmp_path, batch_size=2))
    assert (summary.computed, summary.present, summary.broken) == (5, 0, 0)
    plain, cached = build_dataset(config), cached_dataset(config, tmp_path)
    autoencoder, encoder = build_autoencoder(config), build_text_encoder(config)
    buckets = list(plain.buckets())
    assert buckets == list(cached.buckets())
    largest, _ = Counter(buckets).most_common(1)[0]
    batch = [index for index, bucket in enumerate(buckets) if bucket == largest]
    assert len(batch) == (5 if not multi_scale else 2)
    fly = [plain.load(index, random.Random(index)) for index in batch]
    read = [cached.load(index, random.Random(index)) for index in batch]
    assert [sample.caption for sample in fly] == [sample.caption for sample in read]
    with torch.no_grad():
        latents = autoencoder.encode(normalise_images(torch.stack([sample.image for sample in fly]))).float()
    assert torch.equal(torch.stack([sample.latents for sample in read]), latents)
    prompts = encoder.encode([sample.caption for sample in fly])
    for row, sample in enumerate(read):
        length = int(prompts.mask[row].sum())
        assert sample.prompt_mask.tolist() == prompts.mask[row, :length].tolist() == [1] * length
        assert torch.equal(sample.prompt_embeds, prompts.embeds[row, :length])


def test_records_of_shards_are_cached(small, tmp_path: Path) -> None:
    folder, place = Path(small.data.data_dir[0]), tmp_path / "shards"
    place.mkdir()
    with tarfile.open(place / "00000.tar", "w") as tar:
        for name in ("wide.png", "wide.txt", "tall.png", "tall.txt"):
            tar.add(folder / name, name)
    (place / "00000_VLM.json").write_text('{"tall": {"VLM": "owls"}}')
    small.data.type, small.data.data_dir = "SanaWebDatasetMS", [str(place)]
    assert cache_features(small, options(tmp_path)).computed == 2
    plain, cached = build_dataset(small), cached_dataset(small, tmp_path)
    autoencoder = build_autoencoder(small)
    for index in range(2):
        with torch.no_grad():
            expected = autoencoder.encode(normalise_images(plain.load(index, random.Random(0)).image[None]))[0]
        assert torch.equal(cached.load(index, random.Random(0)).latents, expected)
    assert FeatureCache(tmp_path / "features").get(cached.key(1), vae=False, text=True, caption="owls")


def test_all_captions_of_an_image_are_cached(small, tmp_path: Path) -> None:
    cache_features(small, options(tmp_path))
    cache, encoder = FeatureCache(tmp_path / "features"), build_text_encoder(small)
    for caption in ("a red cat number 2", "two owls on a blue background", "owls"):
        expected = encoder.encode([caption])
        found = cache.get("tall.png", vae=False, text=True, caption=caption)
        assert torch.equal(found["prompt_embeds"], expected.embeds[0, expected.mask[0].bool()])


def test_rounded_features_are_near(small, tmp_path: Path) -> None:
    cache_features(small, options(tmp_path))
    rounded = {"latents_dtype": torch.float16, "text_dtype": torch.bfloat16}
    cache_features(small, options(tmp_path, feature_dir=tmp_path / "rounded", **rounded))
    exact = FeatureCache(tmp_path / "features").get("tall.png", vae=True, text=True)
    near = FeatureCache(tmp_path / "rounded").get("tall.png", vae=True, text=True)
    assert torch.equal(near["latents"], exact["latents"].half())
    assert near["prompt_embeds"].dtype == torch.bfloat16
    assert torch.allclose(near["prompt_embeds"].float(), exact["prompt_embeds"], atol=0.1)


def test_an_interrupted_run_goes_on_where_it_was(small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class InterruptedRunError(Exception):
        pass

    class Failing:
        def __init__(self, dataset, fail_at: int) -> None:
            self.dataset, self.left, self.loaded = dataset, fail_at, []

        def __len__(self) -> int:
            return len(self.dataset)

        def __getattr__(self, name: str):
            return getattr(self.dataset, name)

        def load(self, index: int, rng: random.Random) -> Sample:
            self.left -= 1
            if self.left == 0:
                raise InterruptedRunError
            self.loaded.append(self.dataset.key(index))
            return self.dataset.load(index, rng)

    first, second = Failing(build_dataset(small), 4), Failing(build_dataset(small), 99)
    with pytest.raises(InterruptedRunError):
        cache_features(small, options(tmp_path, batch_size=1, shard_samples=2), first)
    summary = cache_features(small, options(tmp_path, batch_size=1, shard_samples=2), second)
    assert (summary.computed, summary.present) == (3, 2)  # one full shard of two stayed
    assert first.loaded[:2] + second.loaded == [first.key(index) for index in range(5)]
    whole = options(tmp_path, feature_dir=tmp_path / "whole")
    cache_features(small, whole)
    for key in first.loaded + second.loaded:
        resumed = FeatureCache(tmp_path / "features").get(key, vae=True, text=True)
        once = FeatureCache(whole.feature_dir).get(key, vae=True, text=True)
        assert all(torch.equal(resumed[name], once[name]) for name in once)
    again = Failing(build_dataset(small), 99)
    summary = cache_features(small, options(tmp_path), again)
    assert (summary.computed, summary.present, again.loaded) == (0, 5, [])


def test_only_what_changed_is_computed_again(small, tmp_path: Path) -> None:
    cache_features(small, options(tmp_path))
    folder = Path(small.data.data_dir[0])
    write_image(folder / "wide.png", 99, (40, 100))
    (folder / "square.txt").write_text("another caption")
    cached = cached_dataset(small, tmp_path)
    by_key = {cached.key(index): index for index in range(len(cached))}
    for name in ("wide.png", "square.png"):
        with pytest.raises(DataError, match=f"features of {name} .* stale: .*: run python tools/cache_features.py"):
            cached.load(by_key[name], random.Random(0))
    assert cached.load(by_key["tall.png"], random.Random(0)).latents is not None
    summary = cache_features(small, options(tmp_path))
    assert (summary.computed, summary.present) == (2, 3)
    cached = cached_dataset(small, tmp_path)
    assert cached.load(by_key["square.png"], random.Random(0)).caption == "another caption"
    with torch.no_grad():
        image = build_dataset(small).load(by_key["wide.png"], random.Random(0)).image
        expected = build_autoencoder(small).encode(normalise_images(image[None]))[0]
    assert torch.equal(cached.load(by_key["wide.png"], random.Random(0)).latents, expected)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_processes_share_the_work(small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    counts = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        counts.append(cache_features(small, options(tmp_path, num_workers=num_workers)).computed)
    assert sorted(counts) == [2, 3]
    cached = cached_dataset(small, tmp_path)
    assert all(cached.load(index, random.Random(0)).latents.shape == (4, 2, 2) for index in range(5))
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert cache_features(small, options(tmp_path)).present == 5


def test_broken_samples_are_skipped_within_the_budget(small, tmp_path: Path) -> None:
    folder = Path(small.data.data_dir[0])
    (folder / "tall.png").write_bytes((folder / "tall.png").read_bytes()[:300])
    summary = cache_features(small, options(tmp_path))
    assert (summary.computed, summary.broken) == (4, 1)
    with pytest.raises(BrokenSampleError, match="tall.png"):
        FeatureCache(tmp_path / "features").get("tall.png", vae=True, text=True)
    shards = len(list((tmp_path / "features" / "shards").iterdir()))
    assert cache_features(small, options(tmp_path)).broken == 1
    assert len(list((tmp_path / "features" / "shards").iterdir())) == shards  # nothing new to say
    with pytest.raises(DataError, match=r"More than 0 samples cannot be read .* tall.png: .* tools/data_check.py"):
        cache_features(small, options(tmp_path, broken_budget=0))


def test_another_configuration_is_refused(small, tmp_path: Path) -> None:
    cache_features(small, options(tmp_path))
    small.model.image_size = 96
    with pytest.raises(DataError, match="latents in .* stale: image_size was 64 and is now 96"):
        cache_features(small, options(tmp_path))
    small.model.image_size = 64
    small.text_encoder.chi_prompt = ["Do draw this picture."]
    with pytest.raises(DataError, match="text in .* stale: chi_prompt was 'Draw this picture"):
        cache_features(small, options(tmp_path))


def test_training_asks_for_the_networks_that_made_the_cache(small, tmp_path: Path) -> None:
    cache_features(small, options(tmp_path))
    cache = FeatureCache(tmp_path / "features")
    require_features(with_features(small, tmp_path), cache)
    other = build_autoencoder(small)
    with torch.no_grad():
        next(other.parameters()).mul_(1.1)
    with pytest.raises(DataError, match="latents in .* stale: autoencoder_weights was"):
        require_features(small, cache, autoencoder=other)
    small.text_encoder.model_max_length = 32
    with pytest.raises(DataError, match="text in .* stale: model_max_length was 64 and is now 32"):
        require_features(small, cache)
    small.data.load_text_feat = False
    require_features(small, cache)


def test_the_identity_does_not_depend_on_the_dtype(small) -> None:
    text = [build_text_encoder(small, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert text_identity(text[0]) == text_identity(text[1])
    autoencoder = build_autoencoder(small)
    before = latents_identity(small, autoencoder)
    assert before == latents_identity(small, build_autoencoder(small, dtype=torch.bfloat16))
    next(autoencoder.parameters()).data.view(-1)[0] += 1
    assert weights_hash(autoencoder) != before["autoencoder_weights"]
    small.model.aspect_ratio_type = "ASPECT_RATIO_512"  # of no effect without multi_scale
    assert latents_identity(small, build_autoencoder(small)) == before


class Sampling(Autoencoder):
    """Draws from a posterior, as that of SDXL does."""

    latent_channels, downsample_factor, scaling_factor, sample_posterior = 3, 2, 1.0, True

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def raw_encode(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        mean = torch.nn.functional.avg_pool2d(images, 2)
        return mean + torch.randn(mean.shape, generator=generator)


def test_posterior_draws_depend_on_the_content_alone(small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "build_autoencoder", lambda config: Sampling())
    only = {"text": False, "batch_size": 3}
    cache_features(small, options(tmp_path, **only))
    (Path(small.data.data_dir[0]) / "more" / "square.txt").unlink()  # a smaller data set, other batches
    cache_features(small, options(tmp_path, feature_dir=tmp_path / "fewer", **only))
    one, two = FeatureCache(tmp_path / "features"), FeatureCache(tmp_path / "fewer")
    drawn = [cache.get("wide.png", vae=True, text=False)["latents"] for cache in (one, two)]
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], one.get("tall.png", vae=True, text=False)["latents"])


class Plain:
    """A data set with nothing but the protocol; two of its samples hold one image."""

    def __len__(self) -> int:
        return 3

    def key(self, index: int) -> str:
        return f"sample {index}"

    def buckets(self) -> list[str]:
        return ["1.0"] * 3

    def load(self, index: int, rng: random.Random) -> Sample:
        return Sample(self.key(index), f"a red cat {index}", image=torch.full((3, 64, 64), float(index // 2)))

    def fingerprint(self) -> str:
        return "plain"


def test_any_data_set_can_be_cached(small, tmp_path: Path) -> None:
    assert cache_features(small, options(tmp_path), Plain()).computed == 3
    assert cache_features(small, options(tmp_path), Plain()).present == 3
    cache = FeatureCache(tmp_path / "features")
    latents = [cache.get(f"sample {index}", vae=True, text=False)["latents"] for index in range(3)]
    assert torch.equal(latents[0], latents[1])
    assert not torch.equal(latents[0], latents[2])
    assert cache.get("sample 1", vae=False, text=True, caption="a red cat 1")["prompt_mask"].all()


def test_latents_that_are_not_finite_are_broken(small, tmp_path: Path) -> None:
    class Huge(Plain):
        def load(self, index: int, rng: random.Random) -> Sample:
            return Sample(self.key(index), "a", image=torch.full((3, 64, 64), float("inf") if index == 2 else 1.0))

    summary = cache_features(small, options(tmp_path), Huge())
    assert (summary.computed, summary.broken) == (2, 1)
    with pytest.raises(BrokenSampleError, match="not finite"):
        FeatureCache(tmp_path / "features").get("sample 2", vae=True, text=False)


def test_what_cannot_be_cached_is_named(small, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Nothing to do"):
        cache_features(small, options(tmp_path, latents=False, text=False))
    small.data.type = "DrawnScenes"
    with pytest.raises(ConfigError, match="data.type is 'DrawnScenes'; features can be cached of SanaImgDataset"):
        cache_features(small, options(tmp_path))
