"""Writing a quantised pipeline as a model folder, which `SanaPipeline.from_pretrained` loads as it is."""

import dataclasses
import os
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from sana.config import config_to_dict
from sana.models.metadata import CheckpointMetadata, fp16_lineage, save_checkpoint
from sana.models.quantization.apply import quantization_of
from sana.models.quantization.load import to_record
from sana.models.quantization.text import save_text_encoder
from sana.models.text_encoder import TextEncoder
from sana.pipelines import loading

if TYPE_CHECKING:
    from sana.pipelines.sana_pipeline import SanaPipeline

BESIDE = ("README.md", "LICENSE", "LICENSE.txt")  # what says whose the weights are goes with them


def save_quantized(pipeline: "SanaPipeline", source: loading.ModelSource, folder: str | Path) -> Path:
    """Writes a model folder of ours: `model.safetensors`, and `vae/` and `text_encoder/` where they are local.

    Weights are plain tensors with the scheme and the layers in the metadata. Parts that are named by a hub id or URL
    stay named so. The folder appears whole or not at all.

    Args:
        pipeline: loaded; its transformer, its text encoder or both are quantised.
        source: what it was loaded from.
        folder: must not exist yet.

    Returns:
        The folder.

    Raises:
        ValueError: nothing is quantised, or the folder exists.
    """
    folder, transformer = Path(folder), pipeline.transformer
    encoder = pipeline._text_encoder
    if transformer is None or (quantization_of(transformer) is None and not _is_quantized(encoder)):
        raise ValueError("Nothing of the pipeline is quantised: call quantize() and from_pretrained() first.")
    if folder.exists():
        raise ValueError(f"{folder} exists already; name a folder that does not, or remove it.")
    config = config_to_dict(pipeline.config)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir(parents=True)
    try:
        config["vae"]["vae_pretrained"] = _copy(pipeline.config.vae.vae_pretrained, temporary, "vae")
        name = pipeline.config.text_encoder.text_encoder_name
        if isinstance(encoder, TextEncoder) and _is_quantized(encoder):
            save_text_encoder(encoder, temporary / "text_encoder")
            config["text_encoder"]["text_encoder_name"] = "text_encoder"
        else:
            config["text_encoder"]["text_encoder_name"] = _copy(name, temporary, "text_encoder")
        record = {} if quantization_of(transformer) is None else to_record(transformer, "transformer")
        metadata = dataclasses.replace(_metadata(pipeline, source), config=config, quantization=record)
        save_checkpoint(temporary / "model.safetensors", transformer, metadata)
        for one in BESIDE:
            if (source.folder / one).is_file():
                shutil.copyfile(source.folder / one, temporary / one)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _is_quantized(encoder: object) -> bool:
    return isinstance(encoder, nn.Module) and quantization_of(encoder) is not None


def _metadata(pipeline: "SanaPipeline", source: loading.ModelSource) -> CheckpointMetadata:
    """What the weights say about themselves, or, of official ones that say nothing, what their config does."""
    if source.metadata is not None:
        return source.metadata
    config, transformer = pipeline.config, pipeline.transformer
    clip, _ = fp16_lineage(source.ref, None, config.model.mixed_precision)
    return CheckpointMetadata(
        arch={"class": type(transformer).__name__, "kwargs": getattr(transformer, "init_kwargs", {})},
        precision="fp16" if clip else "bf16" if config.model.mixed_precision == "bf16" else "fp32",
        flow_shift=config.scheduler.flow_shift,
        chi_prompt=[line for line in config.text_encoder.chi_prompt or () if line is not None],
        license=f"that of {source.ref}",
    )


def _copy(name: str, folder: Path, part: str) -> str:
    """Copies a local part of a model into its folder; returns how the config names it from there."""
    local = Path(name).expanduser()
    if not local.exists():
        return name
    if local.is_dir():
        shutil.copytree(local, folder / part)
        return part
    shutil.copyfile(local, folder / f"{part}{local.suffix}")
    return f"{part}{local.suffix}"
