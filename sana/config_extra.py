"""Our own options of data and training, which the official configuration has no keys for: `data.extra`, `train.extra`.

A mistyped key fails as in every other section. What the options do stands with the code that reads them.
"""

from dataclasses import dataclass, fields
from typing import Any, Dict, Optional, TypeVar

from sana.config_checks import ConfigError, describe, matches, nearest_key

REMAINDERS = ("pad", "drop", "carry")
ORDERS = ("shuffled", "sequential", "official")
RESIZES = ("exact", "fast")
KERNELS = ("auto", "triton")


@dataclass(frozen=True)
class DataExtra:
    """What `data.extra` may hold.

    Attributes:
        remainder: what becomes of images that do not fill a batch at the end of an epoch: "pad" repeats images of the
            same bucket, "drop" leaves them out, "carry" keeps them for the next epoch.
        order: "shuffled" by seed and epoch, "sequential", or "official" (sequential, with the official drop rule).
        caption_lines: "first" line of a text file is the caption, or "all" of its text.
        broken_budget: how many different broken samples a process skips before it stops.
        feature_dir: folder of cached latents and text features (tools/cache_features.py).
        max_pixels: an image with more pixels is a broken sample (decompression bombs).
        resize: "exact" scales pictures by PIL, as officially; "fast" by torch: several times as fast, at most two of
            255 levels apart.
        stream: tar shards are read from front to back as they arrive, instead of being fetched and indexed first.
        stream_samples: of an epoch of a stream; 0: the wids-meta.json says.
    """

    remainder: str = "pad"
    order: str = "shuffled"
    caption_lines: str = "first"
    broken_budget: int = 100
    feature_dir: Optional[str] = None
    max_pixels: int = 200_000_000
    resize: str = "exact"
    stream: bool = False
    stream_samples: int = 0


@dataclass(frozen=True)
class TrainExtra:
    """What `train.extra` may hold.

    Attributes:
        max_steps: optimiser steps of the whole run; 0: `train.num_epochs` decides.
        keep_last: this many of the newest checkpoints stay.
        keep_every: a checkpoint whose step is a multiple of this stays for ever; 0: none.
        async_save: checkpoints are written while training goes on.
        save_pth: checkpoints hold the official `.pth` file too.
        nonfinite_budget: this many steps with a loss or gradient that is not finite are skipped, then the run stops.
        compile: the transformer runs through torch.compile.
        kernels: "triton" runs the operators that have kernels of their own through them (forward and backward, needs a
            CUDA device); "auto" leaves the choice to PyTorch.
        checkpoint_ffn: the wide values inside every Mix-FFN are computed again for the gradient instead of kept. It
            takes the place of `train.grad_checkpointing`, which does so for whole blocks.
        random_encoders: the autoencoder and the text encoder get random weights of the official shapes (a test only).
        train_text_encoder: the text encoder learns together with the transformer.
        null_caption_probability: part of the captions replaced by the encoded empty text (the pipeline's null branch).
        pool_size: DrawnScenes: cached latents per process.
        refresh: DrawnScenes: entries of the pool that are redrawn per step and process.
    """

    max_steps: int = 0
    keep_last: int = 3
    keep_every: int = 0
    async_save: bool = False
    save_pth: bool = False
    nonfinite_budget: int = 10
    compile: bool = False
    kernels: str = "auto"
    checkpoint_ffn: bool = False
    random_encoders: bool = False
    train_text_encoder: bool = False
    null_caption_probability: float = 0.0
    pool_size: int = 8000
    refresh: int = 3


Extra = TypeVar("Extra", DataExtra, TrainExtra)


def data_extra(raw: Optional[Dict[str, Any]]) -> DataExtra:
    """Checks `data.extra`.

    Raises:
        ConfigError: an unknown key, a wrong type or a value that is not allowed.
    """
    extra = _decode(DataExtra, raw, "data.extra")
    choices = {"remainder": REMAINDERS, "order": ORDERS, "caption_lines": ("first", "all"), "resize": RESIZES}
    for key, allowed in choices.items():
        if getattr(extra, key) not in allowed:
            raise ConfigError(f"data.extra.{key} is {getattr(extra, key)!r}; allowed is {', '.join(allowed)}.")
    if extra.max_pixels < 1 or extra.broken_budget < 0 or extra.stream_samples < 0:
        raise ConfigError(
            "data.extra.max_pixels must be positive, and data.extra.broken_budget and stream_samples not negative."
        )
    if extra.stream_samples and not extra.stream:
        raise ConfigError("data.extra.stream_samples has no effect without data.extra.stream.")
    return extra


def train_extra(raw: Optional[Dict[str, Any]]) -> TrainExtra:
    """Checks `train.extra`.

    Raises:
        ConfigError: an unknown key, a wrong type or a value that is not allowed.
    """
    extra = _decode(TrainExtra, raw, "train.extra")
    for key in ("max_steps", "keep_every", "nonfinite_budget", "refresh"):
        if getattr(extra, key) < 0:
            raise ConfigError(f"train.extra.{key} is {getattr(extra, key)}; it must not be negative.")
    for key in ("keep_last", "pool_size"):
        if getattr(extra, key) < 1:
            raise ConfigError(f"train.extra.{key} is {getattr(extra, key)}; it must be at least 1.")
    if extra.kernels not in KERNELS:
        raise ConfigError(f"train.extra.kernels is {extra.kernels!r}; allowed is {', '.join(KERNELS)}.")
    if not 0 <= extra.null_caption_probability <= 1:
        raise ConfigError(
            f"train.extra.null_caption_probability is {extra.null_caption_probability}; it must be in [0, 1]."
        )
    return extra


def _decode(kind: type[Extra], raw: Any, section: str) -> Extra:
    if raw is None:
        return kind()
    if not isinstance(raw, dict):
        raise ConfigError(f"{section} must be a mapping of keys to values, not {raw!r}.")
    known = {field.name: field.type for field in fields(kind)}
    for key, value in raw.items():
        if key not in known:
            raise ConfigError(f"{section}: unknown key {key!r}.{nearest_key(str(key), list(known))}")
        if not matches(value, known[key]):
            raise ConfigError(f"{section}.{key} = {value!r} has the wrong type; allowed is {describe(known[key])}.")
    return kind(**raw)
