"""From a reference (folder, file, hub id, URL) to a config and loaded networks. Nothing is generated here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sana.config import SanaConfig, config_from_dict, load_config, validate
from sana.models import build_autoencoder, build_text_encoder, build_transformer
from sana.models.autoencoder.base import Autoencoder
from sana.models.quantization.load import Target, Wanted, fill_transformer
from sana.models.text_encoder import PrecomputedTextEncoder, TextEncoder
from sana.models.weights import (
    CheckpointError,
    CheckpointMetadata,
    fp16_lineage,
    load_state_dict,
    load_weights,
    read_metadata,
)
from sana.utils import hub
from sana.utils.dtype import parse_dtype
from sana.utils.logging import get_logger

logger = get_logger(__name__)

LARGE = 100_000_000  # parameters
AnyTextEncoder = TextEncoder | PrecomputedTextEncoder


@dataclass(frozen=True)
class ModelSource:
    """Weights that were found, not yet read.

    Attributes:
        ref: as the user gave it.
        variant: of a folder's weight files.
        path: the local file or folder.
        metadata: what the weights say about themselves; None for the official `.pth`.
    """

    ref: str
    variant: str | None
    path: Path
    metadata: CheckpointMetadata | None

    @property
    def folder(self) -> Path:
        """Where relative paths of the metadata's config start."""
        return self.path if self.path.is_dir() else self.path.parent


def as_config(config: str | Path | Mapping[str, Any] | SanaConfig, overrides: Sequence[str] = ()) -> SanaConfig:
    """Returns a checked config of a YAML file (with `--section.key=value` overrides), a mapping or a config."""
    if isinstance(config, str | Path):
        return load_config(hub.resolve(config, kind="file"), overrides)
    loaded = config_from_dict(dict(config)) if isinstance(config, Mapping) else config
    validate(loaded)
    return loaded


def as_device(device: str | torch.device) -> torch.device:
    """Returns a device that this machine has.

    Raises:
        ValueError: the name is unknown, or there is no such device here.
    """
    try:
        known = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"Unknown device {device!r}; use cpu, cuda, cuda:1 or mps.") from error
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if known.type != "meta" and (known.index or 0) >= count.get(known.type, 1):
        raise ValueError(f"The device {known} is not there: this machine has {count.get(known.type, 0)} of that kind.")
    return known


def find_model(ref: str | Path, variant: str | None = None) -> ModelSource:
    """Finds weights, fetching them when they are remote.

    Raises:
        FetchError: they could not be had.
        CheckpointError: they are damaged, or the folder is no model.
    """
    path = hub.resolve(ref, kind="any", variant=variant)
    return ModelSource(str(ref), variant, path, read_metadata(path, variant=variant))


def source_config(source: ModelSource) -> SanaConfig:
    """Returns the config that weights carry, its paths made absolute.

    Raises:
        CheckpointError: they carry none.
    """
    if source.metadata is None or not source.metadata.config:
        raise CheckpointError(
            f"{source.ref} does not say which model it is; give its YAML too: "
            "SanaPipeline(config).from_pretrained(weights), or --config with --model_path."
        )
    config = config_from_dict(source.metadata.config)
    config.scheduler.flow_shift = source.metadata.flow_shift
    config.vae.vae_pretrained = _beside(source.folder, config.vae.vae_pretrained)
    config.text_encoder.text_encoder_name = _beside(source.folder, config.text_encoder.text_encoder_name)
    validate(config)
    return config


def _beside(folder: Path, name: str) -> str:
    """A path relative to the model's folder as an absolute one; so too an absolute one that is gone, where a copy of
    its last part lies there. Any other name is unchanged."""
    path = Path(name)
    gone = path.is_absolute() and not path.exists()
    inside = folder / (path.name if gone else name)
    return str(inside) if name and inside.exists() else name


def load_transformer(
    source: ModelSource,
    config: SanaConfig,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Wanted | None = None,
    runs_on: torch.device | None = None,
) -> nn.Module:
    """Builds the transformer of a config and loads weights into it.

    A large network whose parameters are all in the file is built without storage: nothing is initialised in vain, and
    on a CPU tensors that have the dtype are read where they lie, in the mapped file. Tables that the file lacks,
    `pos_embed` and the null caption of training, are not read by a sampler.

    Weights that are to be quantised, or are so in the file, are loaded layer by layer: see `fill_transformer`.

    Raises:
        CheckpointError: the weights do not fit the config, or are quantised in another way than asked for.
    """
    clip_fp16, _ = fp16_lineage(source.ref, source.metadata, config.model.mixed_precision)
    stored = load_state_dict(source.path, variant=source.variant)
    record = {} if source.metadata is None else source.metadata.quantization
    if record or quantization is not None:
        with torch.device("meta"):
            empty = build_transformer(config, clip_fp16=clip_fp16)
        target = Target(dtype, device, runs_on or device, quantization)
        return fill_transformer(empty, stored, name=source.ref, record=record, target=target)
    # Torch's machinery for networks without storage takes a second to import: more than a small network needs.
    large = sum(tensor.numel() for tensor in stored.values()) > LARGE
    with torch.device("meta" if large else "cpu"):
        model = build_transformer(config, clip_fp16=clip_fp16)
    if large and any(name not in stored for name, _ in model.named_parameters()):
        model = build_transformer(config, clip_fp16=clip_fp16)
    for name, table in list(model.named_buffers()):
        if table.is_meta and (name not in stored or stored[name].shape != table.shape):
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, torch.zeros(table.shape, dtype=table.dtype))
    model = model.to(dtype)
    load_weights(model, source.path, variant=source.variant, state=stored, inference_device=device)
    return model.to(device).eval().requires_grad_(False)


@torch.inference_mode(False)  # loaded in the middle of a call, its tensors must stay usable outside
def load_autoencoder(config: SanaConfig, device: torch.device) -> Autoencoder:
    """Loads the autoencoder of `config.vae` in `vae.weight_dtype`."""
    autoencoder = build_autoencoder(config, dtype=parse_dtype(config.vae.weight_dtype), device=device, mapped=True)
    return autoencoder.eval().requires_grad_(False)


@torch.inference_mode(False)
def load_text_encoder(
    config: SanaConfig,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Wanted | None = None,
    runs_on: torch.device | None = None,
) -> AnyTextEncoder:
    """Loads the text encoder of `config.text_encoder`, quantised on the way if so told."""
    encoder = build_text_encoder(config, dtype=dtype, device=device, quantization=quantization, runs_on=runs_on)
    return encoder.requires_grad_(False) if isinstance(encoder, nn.Module) else encoder
