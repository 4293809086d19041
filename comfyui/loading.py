"""From a name in a node's list to a loaded network, by sana's own loaders. The lists are in `nodes_load.py`."""

import json
from pathlib import Path

import torch

from sana.config import SanaConfig
from sana.models.autoencoder.base import Autoencoder
from sana.models.autoencoder.dc_ae import DCAE, DCAE_PRESETS, DEFAULT_SCALING_FACTOR
from sana.models.autoencoder.dc_ae_keys import from_diffusers_state_dict
from sana.models.autoencoder.loading import load_autoencoder, parse_config
from sana.models.checkpoint import CheckpointError, read_file
from sana.models.text_encoder import load_text_encoder
from sana.models.text_encoder.chi import CHI_PROMPT, chi_text
from sana.pipelines import loading
from sana.pipelines.options import BUNDLED_MODEL, bundled
from sana.pipelines.sana_pipeline import SanaPipeline
from sana.utils import hub
from sana.utils.dtype import parse_dtype

from . import catalog, host
from .values import Gemma, LatentShape, SanaModel

MODEL_KINDS = ("checkpoints", "diffusers")
TEXT_KINDS = ("text_encoders", "clip")
TEXT_LENGTH = 300  # tokens, of every released model


def repository_file(relative: str) -> Path:
    """Returns a file or folder of sana's checkout.

    Raises:
        ValueError: sana was installed without it.
    """
    path = bundled(relative)
    if not path.exists():
        raise ValueError(f"{path} is missing: install sana with pip install -e FOLDER from its checkout, which has it.")
    return path


@torch.inference_mode(False)  # ComfyUI runs nodes in inference mode; weights made there could not be moved later
def open_model(ckpt_name: str, configuration: str, dtype: str) -> SanaModel:
    """Loads a transformer.

    Args:
        ckpt_name: an official repository, the bundled model, or a file or folder of ComfyUI's.
        configuration: a key of `catalog.CONFIGURATIONS`, for a local file that does not say what it is.
        dtype: one of `catalog.DTYPES`; "auto" is that of `SanaPipeline`: fp32 on a CPU, else the configuration's.

    Raises:
        FetchError, CheckpointError, ConfigError: weights or configuration are missing, broken, or do not fit.
        ValueError: a file is missing, or it is a model that these nodes cannot sample.
    """
    ref = _find_weights(ckpt_name)
    yaml = catalog.CHECKPOINTS.get(ckpt_name)
    source = None if yaml else loading.find_model(ref)
    if source is not None and source.metadata is not None and source.metadata.config:
        config = loading.source_config(source)
    else:
        config = loading.as_config(repository_file(yaml or catalog.CONFIGURATIONS[configuration]))
    _require_flow(config, ckpt_name)
    scaling_factor = latent_scale(config)
    device = host.device()
    auto = torch.float32 if device.type == "cpu" else parse_dtype(config.model.mixed_precision)
    pipeline = SanaPipeline(
        config, device=host.resting_device(), dtype=auto if dtype == "auto" else parse_dtype(dtype)
    ).from_pretrained(ref)
    pipeline.autoencoder = LatentShape(config.vae.vae_latent_dim, config.vae.vae_downsample_rate)
    return SanaModel(pipeline, scaling_factor, 0.0, ckpt_name)


def latent_scale(config: SanaConfig) -> float:
    """Returns the scaling factor of a config's DC-AE, without loading it: its own where it is here, else the config's.

    Raises:
        ValueError: it is no DC-AE, or lies in a folder that is gone.
    """
    if config.vae.vae_type not in ("AutoencoderDC", "dc-ae"):
        raise ValueError(f"These nodes make latents of a DC-AE, and this model has {config.vae.vae_type!r}.")
    folder = Path(config.vae.vae_pretrained)
    for file in (folder / "vae" / "config.json", folder / "config.json"):
        if file.is_file():
            own = parse_config(json.loads(file.read_text(encoding="utf-8"))).scaling_factor
            return float(own or DEFAULT_SCALING_FACTOR)
    if hub.parse_hub_reference(str(folder)) is None:
        raise ValueError(f"This model needs its autoencoder {folder} beside it, whose scale its latents have.")
    return float(config.vae.scale_factor)


@torch.inference_mode(False)
def open_text_encoder(model_name: str, device: str, dtype: str) -> Gemma:
    """Loads a text encoder with the instruction and the length that its image models were trained with.

    Args:
        model_name: a hub id, the bundled encoder, or a folder of ComfyUI's.
        device: a device, or "auto" for ComfyUI's choice.
        dtype: one of `catalog.TEXT_DTYPES`; "default" is fp32 on a CPU, else bf16.

    Raises:
        TextEncoderError: it cannot be had.
        ValueError: there is no such device here.
    """
    where = host.device("text") if device == "auto" else loading.as_device(device)
    length, instruction = TEXT_LENGTH, chi_text(CHI_PROMPT)
    if model_name == catalog.BUNDLED:
        config = loading.source_config(loading.find_model(repository_file(BUNDLED_MODEL)))
        name = config.text_encoder.text_encoder_name
        length, instruction = config.text_encoder.model_max_length, chi_text(config.text_encoder.chi_prompt)
    elif model_name.endswith("/"):
        name = str(host.find(TEXT_KINDS, model_name))
    else:
        repository = model_name.rpartition("/")[2]
        name = str(_folder_of(host.downloaded("text_encoders", f"*{repository}/config.json")) or model_name)
    encoder = load_text_encoder(
        name, dtype=_text_dtype(dtype, where), device=where, model_max_length=length, chi_prompt=instruction
    )
    return Gemma(encoder.requires_grad_(False) if isinstance(encoder, torch.nn.Module) else encoder)


@torch.inference_mode(False)
def open_autoencoder(vae_name: str, kind: str, dtype: str) -> Autoencoder:
    """Loads a DC-AE that reads and makes unscaled latents, as ComfyUI's nodes pass them on.

    Args:
        vae_name: a hub id, the bundled autoencoder, or a file or folder of ComfyUI's.
        kind: a key of `catalog.AUTOENCODER_KINDS`, for a file that lies without its config.json.
        dtype: one of `catalog.DTYPES`; "auto" is fp32, as in `SanaPipeline`.

    Raises:
        FetchError, CheckpointError: it cannot be had, or is another network.
    """
    precision = torch.float32 if dtype == "auto" else parse_dtype(dtype)
    where = host.resting_device("vae")
    if vae_name == catalog.BUNDLED:
        autoencoder = load_autoencoder(repository_file(f"{BUNDLED_MODEL}/vae"), dtype=precision, device=where)
    elif vae_name in catalog.AUTOENCODERS:
        here = _folder_of(host.downloaded("vae", f"*{vae_name.rpartition('/')[2]}/config.json"))
        autoencoder = load_autoencoder(here or vae_name, dtype=precision, device=where)
    else:
        path = host.find(("vae",), vae_name)
        folder = path if path.is_dir() else path.parent
        if (folder / "config.json").is_file():
            autoencoder = load_autoencoder(folder, dtype=precision, device=where)
        else:
            autoencoder = _autoencoder_of_file(path, catalog.AUTOENCODER_KINDS[kind]).to(where, precision)
    if not isinstance(autoencoder, DCAE):
        raise ValueError(f"{vae_name} is a {type(autoencoder).__name__}, and these nodes decode latents of a DC-AE.")
    autoencoder.scaling_factor, autoencoder.shift_factor = 1.0, 0.0
    return autoencoder.eval().requires_grad_(False)


def _require_flow(config: SanaConfig, name: str) -> None:
    """Raises ValueError for a model that the samplers of these nodes cannot sample."""
    kind = config.model.model
    if not config.scheduler.predict_flow_v or "SCM" in kind or "ControlNet" in kind:
        raise ValueError(f"{name} is a {kind}, and these nodes sample flow models only; use sana generate for it.")


def _find_weights(ckpt_name: str) -> Path | str:
    """The weights of a name; of an official one those that an earlier node pack fetched, if they are here."""
    if ckpt_name == catalog.BUNDLED:
        return repository_file(BUNDLED_MODEL)
    if ckpt_name not in catalog.CHECKPOINTS:
        return host.find(MODEL_KINDS, ckpt_name)
    inside = f"checkpoints/{ckpt_name.rpartition('/')[2]}.pth"
    return host.downloaded("sana", f"*/{inside}") or f"hf://{ckpt_name}/{inside}"


def _autoencoder_of_file(path: Path, preset: str) -> DCAE:
    """A DC-AE of a preset, with the weights of one file in the original's or in diffusers' keys."""
    state = read_file(path)
    try:
        if not any(key.startswith("decoder.stages.") for key in state):
            state = from_diffusers_state_dict(state, DCAE_PRESETS[preset])
        with torch.device("meta"):
            model = DCAE(DCAE_PRESETS[preset])
        model.load_state_dict(state, assign=True)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} holds no {preset}; put its config.json beside it.") from error
    return model


def _folder_of(file: Path | None) -> Path | None:
    return None if file is None else file.parent


def _text_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto (comfy)" and (management := host.module("comfy.model_management")) is not None:
        return management.text_encoder_dtype(device)
    if dtype in ("default", "auto (comfy)"):
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return parse_dtype(dtype)
