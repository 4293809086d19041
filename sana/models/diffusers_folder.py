"""The `transformer/` and `scheduler/` parts of a diffusers folder: written, and read for what they say.

The other parts (autoencoder, text encoder, index) are in `pipeline_folder.py`. diffusers itself is not needed.
"""

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana.models.checkpoint import CheckpointError, extra_file
from sana.models.diffusers_config import (
    SIGMA_DATA,
    arch_of_transformer,
    official_config,
    sampler_of_scheduler,
    scheduler_config,
    transformer_config,
)
from sana.models.diffusers_keys import to_diffusers
from sana.models.metadata import CheckpointMetadata, cast_state, read_file_metadata, write_safetensors
from sana.models.text_encoder.chi import CHI_PROMPT

MAX_SHARD_BYTES = 5 * 10**9
CONTROLNET = (
    "diffusers' ControlNet computes something else than Sana's: its branch starts before the first block and is added "
    "after a block, Sana's starts after the first block and is added before one."
)


def write_transformer(
    folder: Path,
    state: Mapping[str, Tensor],
    metadata: CheckpointMetadata,
    *,
    dtype: str | torch.dtype | None = None,
    variant: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes `SanaTransformer2DModel`'s folder, and beside its weights our extra file.

    The extra file holds the tensors that diffusers drops (`y_embedding`, `logvar_linear`) and our metadata, so that
    the way back is exact.

    Args:
        folder: the `transformer` folder; created.
        state: official keys.
        metadata: its `arch` decides the config.
        dtype: cast to this; None keeps.
        variant: name of the weight variant ("bf16"), None for the default files.
        max_shard_bytes: larger weights are split into shards with an index.

    Raises:
        CheckpointError: diffusers cannot express the model, or the weights are of another one.
    """
    if metadata.arch.get("class") == "SanaMSControlNet":
        raise CheckpointError(f"A ControlNet is not converted. {CONTROLNET}")
    config = transformer_config(metadata.arch["kwargs"], state)
    kept, extra, strangers = to_diffusers(cast_state(state, dtype))
    if strangers:
        raise CheckpointError(f"diffusers has no place for {', '.join(strangers[:3])} ({len(strangers)} keys in all).")
    write_weights(folder, "diffusion_pytorch_model", kept, variant, max_shard_bytes)
    weights = folder / weight_name("diffusion_pytorch_model", variant)
    write_safetensors(extra_file(weights), extra, metadata.to_strings())
    write_json(folder / "config.json", config)


def write_scheduler(folder: Path, scheduler_type: str, flow_shift: float, sigma_data: float = SIGMA_DATA) -> str:
    """Writes `scheduler_config.json`; returns the name of the scheduler's class."""
    config = scheduler_config(scheduler_type, flow_shift, sigma_data)
    write_json(folder / "scheduler_config.json", config)
    return config["_class_name"]


def read_folder_metadata(root: Path, weights: Path) -> CheckpointMetadata | None:
    """What a diffusers folder says: from our extra file if it is there, else from diffusers' own JSON files.

    Args:
        root: the folder the user named: a whole pipeline, or a transformer's folder. Paths in the config returned are
            relative to it.
        weights: the transformer's weight file in it.

    Returns:
        None when the folder is not of diffusers. `precision` is "" where nothing says it.

    Raises:
        CheckpointError: a JSON file is broken, or of another model.
    """
    if not weights.name.startswith("diffusion_pytorch_model") or not (weights.parent / "config.json").is_file():
        return None
    pipeline = weights.parent.parent if weights.parent.name == "transformer" else weights.parent
    _refuse_controlnet(pipeline)
    extra = extra_file(weights)
    metadata = read_file_metadata(extra) if extra.is_file() else None
    metadata = metadata or _describe(pipeline, weights.parent / "config.json")
    if root.resolve() != pipeline.resolve():
        for section, key in (("vae", "vae_pretrained"), ("text_encoder", "text_encoder_name")):
            name = metadata.config.get(section, {}).get(key)
            if name and (pipeline / name).exists():
                metadata.config[section][key] = f"../{name}"
    return metadata


def _refuse_controlnet(pipeline: Path) -> None:
    """Raises CheckpointError for a folder whose network has a second part that would be left out."""
    index = pipeline / "model_index.json"
    if index.is_file() and "controlnet" in read_json(index):
        raise CheckpointError(
            f"{pipeline} holds a ControlNet of diffusers. {CONTROLNET} Load the official .pth with its YAML instead."
        )


def _describe(pipeline: Path, transformer: Path) -> CheckpointMetadata:
    """The metadata that diffusers' JSON files imply."""
    arch = arch_of_transformer(read_json(transformer), str(transformer))
    scheduler = pipeline / "scheduler" / "scheduler_config.json"
    default = "scm" if arch["class"] == "SanaMSCM" else "flow_dpm-solver"
    schedule = read_json(scheduler) if scheduler.is_file() else {}
    sampler, flow_shift = sampler_of_scheduler(schedule) if schedule else (default, 3.0)
    vae = pipeline / "vae" / "config.json"
    stages = read_json(vae).get("encoder_block_out_channels", []) if vae.is_file() else []
    config = official_config(arch, sampler, flow_shift, 2 ** (len(stages) - 1) if stages else 32)
    chi_prompt = list(CHI_PROMPT)  # every released model was trained with it
    config["text_encoder"]["chi_prompt"] = chi_prompt
    config["scheduler"]["sigma_data"] = float(schedule.get("sigma_data", SIGMA_DATA))
    if vae.is_file():
        config["vae"]["vae_pretrained"] = "vae"
    if (pipeline / "text_encoder" / "config.json").is_file():
        config["text_encoder"]["text_encoder_name"] = "text_encoder"
    return CheckpointMetadata(arch=arch, precision="", flow_shift=flow_shift, chi_prompt=chi_prompt, config=config)


def weight_name(stem: str, variant: str | None) -> str:
    """File name of unsplit weights: "model.bf16.safetensors"."""
    return f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"


def write_weights(
    folder: Path, stem: str, state: Mapping[str, Tensor], variant: str | None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes weights under the names that diffusers and transformers look for, split when large.

    Files of an earlier export under the same variant are replaced; other variants stay.
    """
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for key, tensor in state.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and used + size > max_shard_bytes:
            shards.append({})
            used = 0
        shards[-1][key] = tensor
        used += size
    folder.mkdir(parents=True, exist_ok=True)
    dotted = f".{variant}" if variant else ""
    index = folder / f"{stem}.safetensors.index{dotted}.json"
    old = [*folder.glob(f"{stem}{dotted}-?????-of-?????.safetensors"), folder / weight_name(stem, variant), index]
    if len(shards) == 1:
        written = [folder / weight_name(stem, variant)]
    else:
        count = len(shards)
        written = [folder / f"{stem}{dotted}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for path, shard in zip(written, shards, strict=True):
        write_safetensors(path, shard)
    if len(shards) > 1:
        weight_map = {key: path.name for path, shard in zip(written, shards, strict=True) for key in shard}
        total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
        written.append(index)
    for path in set(old) - set(written):
        path.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON under a temporary name and moves it in place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        CheckpointError: the file is missing, no JSON, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return content
