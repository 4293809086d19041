"""Computes latents and text features of a data set once, so that training neither encodes images nor captions.

Storage is `sana/data/feature_cache.py`; what makes a cache stale is `feature_identity.py`. Every process of a launch
takes its share of the samples and writes its own shards; nobody waits for anybody.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm

from sana.config import ConfigError, SanaConfig
from sana.config_extra import data_extra
from sana.data import DATASETS
from sana.data.feature_cache import image_hash, latents_hash
from sana.data.feature_writer import FeatureWriter
from sana.data.sample import BrokenSampleError, DataError, Dataset
from sana.data.transforms import fit_to_factor, normalise_images
from sana.models import build_autoencoder, build_text_encoder
from sana.models.autoencoder.base import Autoencoder
from sana.training.build import build_dataset
from sana.training.feature_identity import AnyTextEncoder, latents_identity, text_identity
from sana.utils.distributed import is_main_process, local_rank, rank, share
from sana.utils.logging import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class CacheOptions:
    """How features are computed.

    Attributes:
        feature_dir: where they go.
        latents: compute latents.
        text: compute text features.
        batch_size: images, and captions, that are encoded together.
        latents_dtype: stored dtype of latents; they are computed in `vae.weight_dtype`, as in training.
        text_dtype: dtype in which text features are computed and stored; None: as training computes them.
        num_workers: processes that read images ahead; 0 reads in this one.
        device: None takes the GPU of this process, else the CPU.
        shard_samples: samples of a shard; what is not yet in a shard is lost when the process is killed.
        broken_budget: different unreadable samples of a process before it stops; None: the configuration's.
    """

    feature_dir: str | Path
    latents: bool = True
    text: bool = True
    batch_size: int = 8
    latents_dtype: torch.dtype = torch.float16
    text_dtype: torch.dtype | None = None
    num_workers: int = 0
    device: str | None = None
    shard_samples: int = 512
    broken_budget: int | None = None


@dataclass
class CacheSummary:
    """What one process did: samples computed, found complete, and skipped because they cannot be read."""

    computed: int = 0
    present: int = 0
    broken: int = 0


@dataclass(frozen=True)
class _Record:
    """One sample as it was read; `pixels` is None where its latents are not wanted or are stored already."""

    key: str
    bucket: str
    image: str = ""
    pixels: Tensor | None = None
    captions: tuple[str, ...] = ()
    broken: str = ""


def cache_features(config: SanaConfig, options: CacheOptions, dataset: Dataset | None = None) -> CacheSummary:
    """Computes what is missing in `options.feature_dir` for this process's share of a data set.

    It may be killed at any time: finished shards stay, and the next call goes on after them. A sample whose image or
    captions changed is computed again.

    Args:
        config: names data, autoencoder and text encoder.
        options: see `CacheOptions`.
        dataset: in place of the configuration's. Its methods `image_bytes(index) -> bytes` and `captions(index) ->
            list[str]` are used where it has them; else the pixels are hashed and `load` gives the one caption.

    Raises:
        ConfigError: the configuration names no data set of images.
        DataError: no usable data, too many broken samples, or the folder holds features of other networks or settings.
        CheckpointError, FetchError: a network cannot be had.
    """
    if not (options.latents or options.text):
        raise ConfigError("Nothing to do: neither latents nor text features are wanted.")
    if config.data.type not in DATASETS:
        known = ", ".join(sorted(DATASETS))
        raise ConfigError(f"data.type is {config.data.type!r}; features can be cached of {known}.")
    data = build_dataset(config) if dataset is None else dataset
    device = torch.device(options.device or (f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu"))
    text_dtype = options.text_dtype or (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    autoencoder = build_autoencoder(config).to(device).eval() if options.latents else None
    text_encoder = build_text_encoder(config, dtype=text_dtype).to(device) if options.text else None
    identities = {
        **({"latents": latents_identity(config, autoencoder)} if autoencoder is not None else {}),
        **({"text": text_identity(text_encoder)} if text_encoder is not None else {}),
    }
    budget = data_extra(config.data.extra).broken_budget if options.broken_budget is None else options.broken_budget
    writer = FeatureWriter(
        options.feature_dir, identities, rank=rank(), latents_dtype=options.latents_dtype, text_dtype=text_dtype,
        shard_samples=options.shard_samples,
    )  # fmt: skip
    with writer:
        encoder = _Encoder(writer, autoencoder, text_encoder, options.batch_size, budget)
        buckets = data.buckets()
        mine = share(sorted(range(len(data)), key=lambda index: (buckets[index], index)))
        records = _read(_Reader(data, mine, writer, options), options.num_workers)
        shown = tqdm(records, total=len(mine), desc="caching features", disable=not is_main_process(), mininterval=1)
        for _, same_bucket in groupby(shown, key=lambda record: record.bucket):
            for batch in _batches(same_bucket, options.batch_size):
                encoder.add(batch)
    return encoder.summary


class _Reader(TorchDataset):
    """Reads and hashes samples, perhaps in a worker process; pixels only of images whose latents are missing."""

    def __init__(self, data: Dataset, indices: Sequence[int], writer: FeatureWriter, options: CacheOptions) -> None:
        self.data, self.indices, self.cache = data, indices, writer.cache
        self.latents, self.text = options.latents, options.text
        self.buckets = data.buckets()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> _Record:
        index = self.indices[position]
        key, bucket = self.data.key(index), self.buckets[index]
        try:
            return self._read(index, key, bucket)
        except BrokenSampleError as error:
            return _Record(key, bucket, broken=error.reason)

    def _read(self, index: int, key: str, bucket: str) -> _Record:
        image, pixels, sample = "", None, None
        if self.latents:
            if read_bytes := getattr(self.data, "image_bytes", None):
                image = image_hash(read_bytes(index))
            if not image or not self._is_stored(image, bucket):
                sample = self.data.load(index, random.Random(0))
                pixels = sample.image
                if pixels is None:
                    raise DataError(f"{key}: the data set gave no image to compute latents of.")
                image = image or image_hash(pixels.contiguous().numpy().tobytes())
        captions: tuple[str, ...] = ()
        if self.text:
            if list_captions := getattr(self.data, "captions", None):
                captions = tuple(list_captions(index))
            else:
                captions = ((sample or self.data.load(index, random.Random(0))).caption,)
        return _Record(key, bucket, image, pixels, captions)

    def _is_stored(self, image: str, bucket: str) -> bool:
        return self.cache.holds(latents_hash(image, bucket, self.cache.identities["latents"]))


class _Encoder:
    """Encodes batches of one bucket and hands the features to the writer."""

    def __init__(
        self,
        writer: FeatureWriter,
        autoencoder: Autoencoder | None,
        text_encoder: AnyTextEncoder | None,
        batch_size: int,
        broken_budget: int,
    ) -> None:
        self.writer, self.autoencoder, self.text_encoder = writer, autoencoder, text_encoder
        self.batch_size, self.broken_budget = batch_size, broken_budget
        self.summary = CacheSummary()

    def add(self, records: Sequence[_Record]) -> None:
        good = [record for record in records if not record.broken]
        complete = {record.key for record in good if self._is_complete(record)}
        good = [record for record in good if record.key not in complete]
        if self.autoencoder is not None:
            good = self._add_latents(good)
        if self.text_encoder is not None:
            self._add_captions(good)
        for record in records:
            if record.broken:
                self._add_broken(record.key, record.broken)
        self.summary.computed += len(good)
        self.summary.present += len(complete)
        self.writer.end_sample()

    def _is_complete(self, record: _Record) -> bool:
        """Whether the index has this sample with exactly these contents."""
        known = self.writer.cache.record(record.key)
        if known is None or known.broken:
            return False
        if self.autoencoder is not None:
            name = self.writer.latents_name(record.image, record.bucket)
            if (known.latents, known.image, known.bucket) != (name, record.image, record.bucket):
                return False
            if not self.writer.cache.holds(name):
                return False
        if self.text_encoder is None:
            return True
        names = tuple(dict.fromkeys(self.writer.text_name(caption) for caption in record.captions))
        return known.captions == names and all(self.writer.cache.holds(name) for name in names)

    def _add_latents(self, records: Sequence[_Record]) -> list[_Record]:
        """Returns the records whose latents are finite."""
        named = [(self.writer.latents_name(record.image, record.bucket), record) for record in records]
        fresh = {
            name: record.pixels for name, record in named if record.pixels is not None and not self.writer.holds(name)
        }
        computed = dict(zip(fresh, self._encode_images(fresh), strict=True)) if fresh else {}
        good = []
        for name, record in named:
            latents = computed.get(name)
            if latents is not None and not latents.to(self.writer.latents_dtype).isfinite().all():
                self._add_broken(record.key, f"its latents are not finite in {self.writer.latents_dtype}")
                continue
            self.writer.add_latents(record.key, record.image, record.bucket, latents)
            good.append(record)
        return good

    @torch.inference_mode()
    def _encode_images(self, fresh: dict[str, Tensor]) -> Tensor:
        assert self.autoencoder is not None
        images = torch.stack(list(fresh.values())).to(next(self.autoencoder.parameters()).device)
        images = fit_to_factor(normalise_images(images), self.autoencoder.downsample_factor)
        if not getattr(self.autoencoder, "sample_posterior", False):
            return self.autoencoder.encode(images)
        # Draws from a posterior: by the content, so that they do not depend on what was cached before.
        generators = [torch.Generator(images.device).manual_seed(int(name[:15], 16)) for name in fresh]
        return torch.cat([self.autoencoder.encode(i[None], g) for i, g in zip(images, generators, strict=True)])

    @torch.inference_mode()
    def _add_captions(self, records: Sequence[_Record]) -> None:
        assert self.text_encoder is not None
        captions = dict.fromkeys(caption for record in records for caption in record.captions)
        fresh = [caption for caption in captions if not self.writer.holds(self.writer.text_name(caption))]
        for start in range(0, len(fresh), self.batch_size):
            part = fresh[start : start + self.batch_size]
            encoded = self.text_encoder.encode(part)
            for caption, embeds, mask in zip(part, encoded.embeds, encoded.mask, strict=True):
                self.writer.add_text(caption, embeds, mask)
        for record in records:
            self.writer.add_captions(record.key, record.captions)

    def _add_broken(self, key: str, reason: str) -> None:
        logger.warning("skipped: %s: %s", key, reason)
        known = self.writer.cache.record(key)
        if known is None or known.broken != reason:
            self.writer.add_broken(key, reason)
        self.summary.broken += 1
        if self.summary.broken > self.broken_budget:
            self.writer.flush()
            raise DataError(
                f"More than {self.broken_budget} samples cannot be read (data.extra.broken_budget), the last of them "
                f"{key}: {reason}; look for the cause with tools/data_check.py."
            )


def _batches(records: Iterable[_Record], size: int) -> Iterator[list[_Record]]:
    """Groups records until `size` of them have pixels (or 64 * size have none)."""
    batch: list[_Record] = []
    for record in records:
        batch.append(record)
        if sum(item.pixels is not None for item in batch) >= size or len(batch) >= 64 * size:
            yield batch
            batch = []
    if batch:
        yield batch


def _read(reader: _Reader, num_workers: int) -> Iterable[_Record]:
    if not num_workers:
        return (reader[position] for position in range(len(reader)))
    return DataLoader(reader, batch_size=None, num_workers=num_workers, collate_fn=_unchanged)


def _unchanged(record: Any) -> Any:
    return record
