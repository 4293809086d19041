"""From a checked configuration to what a training run is made of: networks and data. Nothing is trained here."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sana.config import ConfigError, SanaConfig
from sana.config_extra import TrainExtra, data_extra
from sana.data import DATASETS
from sana.data.feature_cache import FeatureCache
from sana.data.loader import TrainingLoader
from sana.data.sample import Dataset
from sana.data.shard_records import RecordOptions
from sana.data.shard_stream import StreamedShards
from sana.data.stream_loader import StreamLoader
from sana.models import build_autoencoder, build_text_encoder, build_transformer
from sana.models.autoencoder.base import Autoencoder
from sana.models.text_encoder import PrecomputedTextEncoder, TextEncoder
from sana.models.transformer.attention import set_backend
from sana.models.transformer.mix_ffn import MixFFN
from sana.models.weights import load_weights
from sana.ops.backend import TritonUnavailableError, choose
from sana.training.captions import CaptionEncoder
from sana.training.feature_identity import require_features
from sana.training.objective import FlowObjective, NoiseOptions
from sana.training.parallel import Parallel
from sana.training.random_encoders import random_autoencoder, random_text_encoder
from sana.training.scene_latents import SceneBatches
from sana.utils.hub import resolve

TRAINED_FAMILIES = ("SanaMS_", "SanaMS1.5_", "Sana_")  # Sprint's distillation and the ControlNet need other losses


@dataclass
class Networks:
    """The networks of a run; those that cached features replace are None.

    Attributes:
        transformer: trained.
        autoencoder: frozen.
        text_encoder: frozen, or trained with the transformer (`train.extra.train_text_encoder`).
    """

    transformer: nn.Module
    autoencoder: Autoencoder | None
    text_encoder: TextEncoder | PrecomputedTextEncoder | None


def check_trainable(config: SanaConfig, extra: TrainExtra) -> None:
    """Refuses what this trainer does not train, before anything is loaded.

    Raises:
        ConfigError: names the key and what is allowed.
    """
    if not config.model.model.startswith(TRAINED_FAMILIES):
        raise ConfigError(f"model.model is {config.model.model!r}; train.py trains Sana and SanaMS models.")
    if not config.scheduler.predict_flow_v or config.scheduler.pred_sigma:
        raise ConfigError("scheduler.predict_flow_v must be true and pred_sigma false: train.py trains flow matching.")
    if extra.save_pth and config.train.use_fsdp:
        raise ConfigError("train.extra.save_pth does not go with train.use_fsdp: the shards are never in one place.")
    if config.train.snr_loss:
        raise ConfigError("train.snr_loss is true; it is for models of noise, and flow matching has weighting_scheme.")
    if extra.checkpoint_ffn and config.train.grad_checkpointing:
        raise ConfigError(
            "train.extra.checkpoint_ffn and train.grad_checkpointing are both true: the second computes whole blocks "
            "again and leaves nothing for the first; switch one of them off."
        )
    if extra.checkpoint_ffn and not config.model.ffn_type.startswith("glumbconv"):
        raise ConfigError(f"train.extra.checkpoint_ffn needs a Mix-FFN; model.ffn_type is {config.model.ffn_type!r}.")
    if unknown := sorted(set(config.train.auto_lr or {}) - {"rule", "base_batch_size"}):
        raise ConfigError(f"train.auto_lr has no key {unknown[0]!r}; it knows rule and base_batch_size.")
    if extra.random_encoders and (config.model.load_from or config.load_from):
        raise ConfigError("train.extra.random_encoders is a test without real data; it cannot go with model.load_from.")
    if extra.train_text_encoder and config.data.load_text_feat:
        raise ConfigError("train.extra.train_text_encoder needs captions, but data.load_text_feat gives cached ones.")


def require_start(config: SanaConfig) -> None:
    """Fetches the weights to start from before anything is built, so that a missing one is told within seconds.

    Raises:
        FetchError: they cannot be had.
    """
    if source := config.model.load_from or config.load_from:
        resolve(source, kind="any")


def build_networks(config: SanaConfig, extra: TrainExtra) -> Networks:
    """Builds the networks on the CPU; the transformer starts from `model.load_from` where that is given.

    Raises:
        ConfigError, CheckpointError, FetchError: one sentence about what does not fit or could not be had.
    """
    transformer = build_transformer(config).train()
    if source := config.model.load_from or config.load_from:
        load_weights(transformer, source)
    dtype = torch.float32 if extra.train_text_encoder or not torch.cuda.is_available() else torch.bfloat16
    need_autoencoder = not config.data.load_vae_feat or config.train.visualize
    need_text = not config.data.load_text_feat or config.train.visualize
    if extra.random_encoders:
        autoencoder: Any = random_autoencoder(config)
        text: Any = random_text_encoder(config, dtype=dtype)
    else:
        autoencoder = build_autoencoder(config) if need_autoencoder else None
        text = build_text_encoder(config, dtype=dtype) if need_text else None
    if extra.train_text_encoder and not isinstance(text, TextEncoder):
        raise ConfigError("train.extra.train_text_encoder needs a text encoder, not a file of embeddings.")
    for network in (autoencoder, text):
        if isinstance(network, nn.Module):
            network.requires_grad_(False).eval()
    return Networks(transformer, autoencoder, text)


def choose_kernels(transformer: nn.Module, extra: TrainExtra, device: torch.device) -> None:
    """Sets what the operators of a transformer run through and keep (`train.extra.kernels`, `checkpoint_ffn`).

    Raises:
        ConfigError: Triton kernels are asked for where they cannot run.
    """
    for module in transformer.modules():
        if isinstance(module, MixFFN):
            module.recompute_expansion = extra.checkpoint_ffn
    if extra.kernels == "auto":
        return
    try:
        choose(extra.kernels, torch.empty(0, device=device))
    except TritonUnavailableError as error:
        raise ConfigError(f"train.extra.kernels is {extra.kernels}. {error}") from error
    set_backend(transformer, extra.kernels)


def build_objective(config: SanaConfig, extra: TrainExtra, networks: Networks) -> FlowObjective:
    """Returns the module that is trained."""
    captions, text = None, networks.text_encoder
    if extra.train_text_encoder:
        assert isinstance(text, TextEncoder)
        text.model.requires_grad_(True).train()
        captions = CaptionEncoder(
            text.tokenizer, text.model, text.chi_prompt, text.model_max_length, sharded=config.train.use_fsdp
        )
    return FlowObjective(
        networks.transformer, flow_shift=config.scheduler.flow_shift, captions=captions, compile=extra.compile
    )  # fmt: skip


def noise_options(config: SanaConfig, extra: TrainExtra) -> NoiseOptions:
    """Returns how noise levels and dropped captions are drawn."""
    scheduler, joint = config.scheduler, extra.train_text_encoder
    return NoiseOptions(
        seed=config.train.seed,
        scheme=scheduler.weighting_scheme or "uniform",
        logit_mean=scheduler.logit_mean,
        logit_std=scheduler.logit_std,
        drop_probability=extra.null_caption_probability if joint else config.model.class_dropout_prob,
    )


def build_data(config: SanaConfig, extra: TrainExtra, parallel: Parallel, networks: Networks) -> Any:
    """Returns what gives batches: `next_batch()`, `state_dict()`, `load_state_dict()`, `fingerprint`, `len_epoch`.

    Raises:
        ConfigError: an option that is not allowed.
        DataError: there is no usable data; names the folder.
    """
    data, train, options = config.data, config.train, data_extra(config.data.extra)
    if data.type == "DrawnScenes":
        assert networks.autoencoder is not None
        return SceneBatches(
            networks.autoencoder, train.train_batch_size, pool_size=extra.pool_size, refresh=extra.refresh,
            seed=train.seed, rank=parallel.rank, dtype=parallel.mixed_precision, show_progress=parallel.is_main,
        )  # fmt: skip
    if options.stream:
        return build_stream(config, parallel)
    cached = options.feature_dir if data.load_vae_feat or data.load_text_feat else None
    if cached:
        require_features(
            config, FeatureCache(cached), autoencoder=networks.autoencoder, text_encoder=networks.text_encoder
        )
    dataset = build_dataset(config, latents=data.load_vae_feat, text=data.load_text_feat, feature_dir=cached)
    return TrainingLoader(
        dataset, train.train_batch_size, seed=train.seed, remainder=options.remainder, order=options.order,
        rank=parallel.rank, world_size=parallel.world_size, num_workers=train.num_workers,
        broken_budget=options.broken_budget, pin_memory=parallel.device.type == "cuda",
    )  # fmt: skip


def build_dataset(
    config: SanaConfig, *, latents: bool = False, text: bool = False, feature_dir: str | None = None
) -> Dataset:
    """Builds the data set of a configuration.

    Args:
        config: sections data and model.
        latents: cached latents are read instead of images.
        text: cached text features are read.
        feature_dir: where they are; None: beside the images.

    Raises:
        ConfigError: an unknown `data.type`.
        DataError: there is no usable data; names the folder.
    """
    data, options = config.data, data_extra(config.data.extra)
    return DATASETS[data.type](
        data_dir=[folder for folder in data.data_dir if folder],
        image_size=config.model.image_size,
        aspect_ratio_type=config.model.aspect_ratio_type,
        multi_scale=config.model.multi_scale,
        transform=data.transform,
        external_caption_suffixes=data.external_caption_suffixes,
        external_clipscore_suffixes=data.external_clipscore_suffixes,
        clip_thr=data.clip_thr,
        clip_thr_temperature=data.clip_thr_temperature,
        sort_dataset=data.sort_dataset,
        caption_lines=options.caption_lines,
        max_pixels=options.max_pixels,
        resize=options.resize,
        load_vae_feat=latents,
        load_text_feat=text,
        feature_dir=feature_dir,
    )


def build_stream(config: SanaConfig, parallel: Parallel) -> StreamLoader:
    """Returns batches of shards that are read as they arrive (`data.extra.stream`).

    Raises:
        ConfigError: an option that has no effect on a stream.
        DataError: there are no shards, or the length of an epoch is not known.
    """
    data, train, options = config.data, config.train, data_extra(config.data.extra)
    if not data.type.startswith("SanaWebDataset"):
        raise ConfigError(f"data.extra.stream is true and data.type {data.type!r}; only SanaWebDataset is streamed.")
    if options.feature_dir or options.order == "official":
        key = "feature_dir" if options.feature_dir else "order: official"
        raise ConfigError(f"data.extra.{key} needs random access; it cannot go with data.extra.stream.")
    records = RecordOptions(
        config.model.image_size, config.model.aspect_ratio_type, config.model.multi_scale, data.transform,
        data.clip_thr, data.clip_thr_temperature, options.caption_lines, options.max_pixels,
        data.load_vae_feat, data.load_text_feat, options.resize,
    )  # fmt: skip
    shards = StreamedShards(
        [folder for folder in data.data_dir if folder], records, rank=parallel.rank, world_size=parallel.world_size,
        seed=train.seed, shuffle=options.order == "shuffled",
        external_caption_suffixes=data.external_caption_suffixes,
        external_clipscore_suffixes=data.external_clipscore_suffixes,
    )  # fmt: skip
    return StreamLoader(
        shards, train.train_batch_size, samples=options.stream_samples or None, num_workers=train.num_workers,
        broken_budget=options.broken_budget, pin_memory=parallel.device.type == "cuda",
    )  # fmt: skip
