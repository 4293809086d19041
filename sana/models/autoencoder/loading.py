"""Autoencoder folders: loading every known kind, and writing ours.

Key names are in `dc_ae_keys.py`, the networks in `dc_ae.py` and `kl.py`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sana.models.autoencoder.base import Autoencoder
from sana.models.autoencoder.dc_ae import DCAE, DCAE_PRESETS, DCAEConfig
from sana.models.autoencoder.dc_ae_keys import config_from_diffusers, from_diffusers_state_dict
from sana.models.autoencoder.kl import load_kl
from sana.models.checkpoint import CheckpointError, find_weights, read_file
from sana.registry import suggest
from sana.utils import hub

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def load_autoencoder(
    ref: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    sample_posterior: bool = True,
    mapped: bool = False,
) -> Autoencoder:
    """Loads an autoencoder in eval mode from a folder, a `vae/` folder inside it, or a hub id.

    Known kinds: ours (`save_autoencoder`), the original DC-AE format (config.json with `model_name`), diffusers'
    AutoencoderDC, and diffusers' AutoencoderKL (which needs diffusers).

    Args:
        ref: local folder, hub id or hf://owner/repo[/folder].
        dtype: what the stored tensors are cast to.
        device: where the weights go.
        sample_posterior: for AutoencoderKL; DC-AE has no posterior.
        mapped: for inference: weights that have the dtype and stay on the CPU are read from the file where they lie,
            and must not be trained. False: in memory of their own.

    Raises:
        CheckpointError: no autoencoder is there, or its weights do not fit its config.
        FetchError: it could not be had.
    """
    folder = _find_folder(hub.resolve(ref, kind="folder"))
    raw = _read_config(folder / CONFIG_FILE)
    if raw.get("_class_name") == "AutoencoderKL":
        return load_kl(folder, dtype=dtype, sample_posterior=sample_posterior).to(device).eval()
    try:
        config = parse_config(raw)
        state = read_file(find_weights(folder))
        if raw.get("_class_name") == "AutoencoderDC":
            state = from_diffusers_state_dict(state, config)
        with torch.device("meta"):
            model = DCAE(config)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder} is no readable DC-AE: {error}") from error
    _load_strictly(model, state, dtype, device, folder, mapped)
    return model.eval()


def save_autoencoder(autoencoder: DCAE, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Writes `config.json` (with the current scaling factor) and `model.safetensors` with original keys.

    Each file is complete or absent, also when the process is killed.

    Args:
        autoencoder: the DC-AE to write.
        folder: made if needed.
        dtype: storage dtype of floating-point tensors, for instance bf16; None keeps theirs.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(autoencoder.config, scaling_factor=float(autoencoder.scaling_factor))
    state = {
        key: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for key, tensor in autoencoder.state_dict().items()
    }
    text = json.dumps({"class": "DCAE"} | dataclasses.asdict(config), indent=2) + "\n"
    weights, described = folder / f".{WEIGHTS_FILE}.part", folder / f".{CONFIG_FILE}.part"
    save_file(state, weights, metadata={"format": "pt"})
    described.write_text(text, encoding="utf-8")
    os.replace(weights, folder / WEIGHTS_FILE)
    os.replace(described, folder / CONFIG_FILE)


def parse_config(raw: Mapping[str, Any]) -> DCAEConfig:
    """The DC-AE that a parsed config.json describes (ours, the original format's, or diffusers').

    Raises:
        ValueError: an unknown kind, preset or key, or an impossible shape.
    """
    if raw.get("_class_name") == "AutoencoderDC":
        return config_from_diffusers(raw)
    if "model_name" in raw:
        name = str(raw["model_name"])
        if name not in DCAE_PRESETS:
            raise ValueError(
                f"unknown model_name {name!r}.{suggest(name, list(DCAE_PRESETS))} Known: {', '.join(DCAE_PRESETS)}"
            )
        return DCAE_PRESETS[name]
    if raw.get("class") != "DCAE":
        kind = raw.get("_class_name", raw.get("class"))
        raise ValueError(f"its config.json describes {kind!r}; known are DCAE, AutoencoderDC and AutoencoderKL")
    fields = {field.name for field in dataclasses.fields(DCAEConfig)}
    if unknown := sorted(set(raw) - fields - {"class"}):
        raise ValueError(f"unknown keys in config.json: {', '.join(unknown)}")
    return DCAEConfig(**{key: value for key, value in raw.items() if key in fields})


def _find_folder(folder: Path) -> Path:
    for candidate in (folder / "vae", folder):
        if (candidate / CONFIG_FILE).is_file():
            return candidate
    raise CheckpointError(f"{folder} is no autoencoder: neither {CONFIG_FILE} nor vae/{CONFIG_FILE} is in it.")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds a {type(raw).__name__}, not an object with the autoencoder's shape.")
    return raw


def _load_strictly(
    model: DCAE, state: Mapping[str, Tensor], dtype: torch.dtype, device: str | torch.device, folder: Path, mapped: bool
) -> None:
    """Gives a model on the meta device the weights, its own copy of them unless they may stay `mapped`.

    Raises:
        CheckpointError: a key or shape differs; the first one is named.
    """
    own = model.state_dict()
    problems = [f"{key} is missing" for key in own if key not in state]
    problems += [f"{key} is unknown" for key in state if key not in own]
    problems += [
        f"{key} is {tuple(state[key].shape)} in the file and {tuple(own[key].shape)} by its config"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        more = f" ({len(problems) - 1} more differences)" if len(problems) > 1 else ""
        raise CheckpointError(f"The weights in {folder} do not fit its {CONFIG_FILE}: {problems[0]}{more}.")
    cast = {
        key: tensor.to(device, dtype if tensor.is_floating_point() else None, copy=not mapped)
        for key, tensor in state.items()
    }
    model.load_state_dict(cast, assign=True)
