"""Whole folders, converted both ways: our model folder (or an official file) <-> the layout of diffusers' pipelines.

The transformer's part is in `diffusers_folder.py`. diffusers itself is not needed.
"""

import math
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana.models.autoencoder.dc_ae import DCAE
from sana.models.autoencoder.dc_ae_keys import config_to_diffusers, to_diffusers_state_dict
from sana.models.autoencoder.loading import load_autoencoder, save_autoencoder
from sana.models.checkpoint import CheckpointError, find_weights, load_state_dict, read_file
from sana.models.diffusers_config import DIFFUSERS_VERSION, SIGMA_DATA, pipeline_class
from sana.models.diffusers_folder import (
    read_json,
    weight_name,
    write_json,
    write_scheduler,
    write_transformer,
    write_weights,
)
from sana.models.diffusers_keys import EXTRA_KEYS
from sana.models.metadata import CheckpointMetadata, cast_state, official_precision, save_checkpoint
from sana.models.text_encoder.load import find_text_encoder
from sana.models.weights import read_metadata
from sana.utils import hub
from sana.utils.dtype import parse_dtype
from sana.utils.logging import get_logger

logger = get_logger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
# transformers' model_type -> the class without a language head, which diffusers' pipelines call
TEXT_CLASSES = {
    "gemma": "GemmaModel",
    "gemma2": "Gemma2Model",
    "gemma3_text": "Gemma3TextModel",
    "qwen2": "Qwen2Model",
    "t5": "T5EncoderModel",
}


@dataclass(frozen=True)
class ExportOptions:
    """How a diffusers folder is written.

    Attributes:
        scheduler_type: "flow-dpm_solver", "flow-euler" or "scm".
        dtype: of the stored weights; None keeps what is there.
        variant: suffix of the weight files ("bf16"); None writes the default files. Both may stand in one folder.
        full: also write autoencoder, text encoder, tokenizer, scheduler and model_index.json.
        vae: where the autoencoder is; anything `load_autoencoder` takes.
        text_encoder: where the text encoder is: a folder, an official name or a hub id.
    """

    scheduler_type: str = "flow-dpm_solver"
    dtype: str | None = None
    variant: str | None = None
    full: bool = False
    vae: str = "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"
    text_encoder: str = "gemma-2-2b-it"


def export_pipeline(
    folder: str | Path, state: Mapping[str, Tensor], metadata: CheckpointMetadata, options: ExportOptions
) -> None:
    """Writes a folder that `diffusers.SanaPipeline.from_pretrained` loads; the index comes last.

    Args:
        folder: created when missing; files of other variants in it stay.
        state: the transformer's official state dict.
        metadata: says the architecture and the shift.
        options: see `ExportOptions`.

    Raises:
        CheckpointError: diffusers cannot express the model, or a part is damaged.
        FetchError, TextEncoderError: a part could not be had.
    """
    folder = Path(folder)
    index: dict[str, Any] = {
        "_class_name": pipeline_class(metadata.arch),
        "_diffusers_version": DIFFUSERS_VERSION,
    }
    vae, text_encoder = "vae", "text_encoder"
    if not options.full:
        vae, text_encoder = _relative(options.vae, folder), _relative(options.text_encoder, folder)
    metadata = _with_parts(metadata, vae, text_encoder)
    write_transformer(folder / "transformer", state, metadata, dtype=options.dtype, variant=options.variant)
    if not options.full:
        return
    sigma_data = float(metadata.config.get("scheduler", {}).get("sigma_data", SIGMA_DATA))
    scheduler = write_scheduler(folder / "scheduler", options.scheduler_type, metadata.flow_shift, sigma_data)
    write_autoencoder(folder / "vae", options.vae, options.dtype, options.variant)
    text_class, tokenizer_class = write_text_encoder(folder, options.text_encoder, options.dtype, options.variant)
    index |= {
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", text_class],
        "tokenizer": ["transformers", tokenizer_class],
        "transformer": ["diffusers", "SanaTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderDC"],
    }
    write_json(folder / "model_index.json", index)


def import_pipeline(
    ref: str | Path, target: str | Path, *, variant: str | None = None, dtype: str | None = None, full: bool = False
) -> tuple[str, ...]:
    """Turns a diffusers folder into ours, or into one file with official keys.

    Args:
        ref: diffusers folder or hub id.
        target: a folder (ours: `model.safetensors`, with `full` also `vae/` and `text_encoder/`), or a file ending in
            .safetensors (with metadata) or .pth (`state_dict`, as released).
        variant: which weight variant to read.
        dtype: of the stored weights; None keeps what is there.
        full: also convert autoencoder and text encoder; needs a folder as target.

    Returns:
        The official tensors that the folder lacks and that were initialised afresh; they are logged as well.

    Raises:
        CheckpointError: the folder is no diffusers Sana, or is damaged.
        FetchError: it could not be had.
        ValueError: `full` with a file as target.
    """
    target = Path(target)
    single = target.suffix in (".pth", ".safetensors")
    if full and single:
        raise ValueError(f"A full pipeline needs a folder to be written to, and {target} names a file.")
    source = hub.resolve(ref, kind="folder", variant=variant)
    metadata = read_metadata(source, variant=variant)
    if metadata is None:
        raise CheckpointError(f"{ref} is no diffusers folder of Sana: it has no transformer/config.json.")
    metadata = _settle(metadata, str(ref), source, target.parent if single else target, full)
    state, fresh = complete_state(load_state_dict(source, variant=variant), metadata.arch)
    state = cast_state(state, dtype)
    if full:
        _import_parts(source, target, variant, dtype)
    if target.suffix == ".pth":
        _save_pth(target, state)
    else:
        save_checkpoint(target if single else target / "model.safetensors", state, metadata)
    if fresh:
        logger.warning("%s lacks %s: initialised afresh (only training uses them)", ref, ", ".join(fresh))
    return fresh


def complete_state(state: Mapping[str, Tensor], arch: Mapping[str, Any]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Adds the official tensors that diffusers drops, when the folder did not carry them.

    `y_embedding` is drawn as in the constructor, with a fixed seed; `logvar_linear` is zero, a log-variance of 0.

    Returns:
        (complete state dict, names of what was added).
    """
    kwargs, complete = arch["kwargs"], dict(state)
    length, channels, hidden = kwargs["model_max_length"], kwargs["caption_channels"], kwargs["hidden_size"]
    noise = torch.randn(length, channels, generator=torch.Generator().manual_seed(0))
    fresh = dict(zip(EXTRA_KEYS, (noise / math.sqrt(channels), torch.zeros(1, hidden), torch.zeros(1)), strict=True))
    wanted = EXTRA_KEYS if kwargs.get("logvar") else EXTRA_KEYS[:1]
    added = tuple(key for key in wanted if key not in complete)
    dtype = next(iter(state.values())).dtype
    complete |= {key: fresh[key].to(dtype) for key in added}
    return complete, added


def write_autoencoder(folder: Path, ref: str, dtype: str | None, variant: str | None) -> None:
    """Writes a DC-AE as diffusers' `AutoencoderDC`."""
    autoencoder = load_autoencoder(ref, dtype=parse_dtype(dtype or "fp32"))
    if not isinstance(autoencoder, DCAE):
        raise CheckpointError(f"{ref} is a {type(autoencoder).__name__}; diffusers' Sana pipelines need a DC-AE.")
    try:
        config = config_to_diffusers(replace(autoencoder.config, scaling_factor=float(autoencoder.scaling_factor)))
    except ValueError as error:
        raise CheckpointError(f"{ref} cannot be written for diffusers: {error}.") from error
    state = to_diffusers_state_dict(autoencoder.state_dict())
    write_weights(folder, "diffusion_pytorch_model", state, variant)
    write_json(folder / "config.json", {"_diffusers_version": DIFFUSERS_VERSION} | config)


def write_text_encoder(folder: Path, ref: str, dtype: str | None, variant: str | None) -> tuple[str, str]:
    """Writes `text_encoder/` (without a language head) and `tokenizer/`.

    Returns:
        The names of their classes in transformers.
    """
    weights_folder, tokenizer_folder = _text_folders(find_text_encoder(ref))
    config = read_json(weights_folder / "config.json")
    text_class = TEXT_CLASSES.get(str(config.get("model_type")))
    if text_class is None:
        raise CheckpointError(
            f"{weights_folder} is a {config.get('model_type')!r}; known are {', '.join(TEXT_CLASSES)}."
        )
    _copy_text_encoder(
        weights_folder, folder / "text_encoder", config | {"architectures": [text_class]}, dtype, variant
    )
    _copy_tokenizer(tokenizer_folder, folder / "tokenizer")
    tokenizer_class = "PreTrainedTokenizerFast"
    if (tokenizer_folder / "tokenizer_config.json").is_file():
        named = str(read_json(tokenizer_folder / "tokenizer_config.json").get("tokenizer_class", ""))
        tokenizer_class = "GemmaTokenizerFast" if named.startswith("GemmaTokenizer") else tokenizer_class
    return text_class, tokenizer_class


def _settle(metadata: CheckpointMetadata, ref: str, source: Path, folder: Path, full: bool) -> CheckpointMetadata:
    """Writes down what a converted checkpoint would lose with its place: training precision, licence, its parts."""
    official = official_precision(ref)
    precision = metadata.precision or (official[0] if official else "")
    metadata = replace(metadata, precision=precision, license=metadata.license or f"that of {ref}")
    if full:
        return _with_parts(metadata, "vae", "text_encoder")
    vae = metadata.config.get("vae", {}).get("vae_pretrained")
    text = metadata.config.get("text_encoder", {}).get("text_encoder_name")
    if Path(ref).expanduser().is_dir():
        beside = [str(source / part) if part and (source / part).exists() else part for part in (vae, text)]
        return _with_parts(metadata, *(part and _relative(part, folder) for part in beside))
    hub_vae = f"{hub.parse_hub_reference(ref)}/vae" if vae == "vae" else vae
    return _with_parts(metadata, hub_vae, ExportOptions.text_encoder if text == "text_encoder" else text)


def _with_parts(metadata: CheckpointMetadata, vae: str | None, text_encoder: str | None) -> CheckpointMetadata:
    """The metadata with a config that names these parts."""
    config = {key: dict(value) if isinstance(value, dict) else value for key, value in metadata.config.items()}
    if vae:
        config.setdefault("vae", {})["vae_pretrained"] = vae
    if text_encoder:
        config.setdefault("text_encoder", {})["text_encoder_name"] = text_encoder
    return replace(metadata, config=config)


def _relative(name: str, folder: Path) -> str:
    """A local path as seen from a folder; any other name unchanged."""
    return os.path.relpath(name, folder) if Path(name).exists() else name


def _import_parts(source: Path, target: Path, variant: str | None, dtype: str | None) -> None:
    autoencoder = load_autoencoder(source / "vae")
    if not isinstance(autoencoder, DCAE):
        raise CheckpointError(f"{source / 'vae'} is a {type(autoencoder).__name__}; our folders hold a DC-AE.")
    save_autoencoder(autoencoder, target / "vae", dtype=None if dtype is None else parse_dtype(dtype))
    weights_folder, tokenizer_folder = _text_folders(source)
    config = read_json(weights_folder / "config.json")
    _copy_text_encoder(weights_folder, target / "text_encoder", config, dtype, None, read_variant=variant)
    _copy_tokenizer(tokenizer_folder, target / "text_encoder")


def _text_folders(folder: Path) -> tuple[Path, Path]:
    """Where weights and tokenizer are: one folder, or diffusers' two."""
    weights = folder / "text_encoder" if (folder / "text_encoder").is_dir() else folder
    for candidate in (weights, weights / "tokenizer", weights.parent / "tokenizer"):
        if any((candidate / name).is_file() for name in TOKENIZER_FILES[:3]):
            return weights, candidate
    raise CheckpointError(f"{folder} has no tokenizer: none of {', '.join(TOKENIZER_FILES[:3])} is in it.")


def _copy_text_encoder(
    source: Path,
    target: Path,
    config: dict[str, Any],
    dtype: str | None,
    variant: str | None,
    *,
    read_variant: str | None = None,
) -> None:
    stored = read_file(find_weights(source, read_variant))
    state = {key.removeprefix("model."): tensor for key, tensor in stored.items() if not key.startswith("lm_head.")}
    state = cast_state(state, dtype)
    write_weights(target, "model", state, variant)
    if variant is not None and (target / weight_name("model", None)).is_file() and (target / "config.json").is_file():
        return  # the config is that of the default files, which decide the dtype that transformers loads in
    if dtype is not None:
        name = str(parse_dtype(dtype)).removeprefix("torch.")
        config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": name}
    write_json(target / "config.json", config)


def _copy_tokenizer(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _save_pth(path: Path, state: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        torch.save({"state_dict": dict(state)}, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
