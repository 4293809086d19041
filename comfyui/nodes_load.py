"""The nodes that load: model, text encoder, VAE. Their lists are `catalog.py` and ComfyUI's folders."""

from typing import Any

import torch

from . import catalog, host, loading
from .patcher import as_comfy_model
from .vae import SanaVAE
from .values import Gemma

_MODEL_MARKERS, _NETWORK_MARKERS = ("model_index.json",), ("config.json",)


class SanaCheckpointLoader:
    """Loads a Sana transformer; official ones are downloaded when they are first used."""

    TITLE = "Sana Checkpoint Loader"
    CATEGORY = "ExtraModels/Sana"
    DESCRIPTION = "Loads a Sana model. Official names are downloaded once; others come from ComfyUI's models folder."
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    FUNCTION = "load_checkpoint"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  ComfyUI's name
        """Returns the inputs, in the order of their widgets."""
        names = [*catalog.CHECKPOINTS, catalog.BUNDLED, *host.file_names("checkpoints")]
        names += host.folder_names("diffusers", _MODEL_MARKERS)
        model = {
            "default": catalog.DEFAULT_CONFIGURATION,
            "tooltip": "For a file of your own that does not say what it is; official names know theirs.",
        }
        dtype = {"default": "auto", "tooltip": "auto: FP32 on a CPU, else what the model was trained in."}
        return {
            "required": {
                "ckpt_name": (names, {"tooltip": "An official repository, the bundled model, or a file of yours."}),
                "model": (list(catalog.CONFIGURATIONS), model),
            },
            "optional": {"dtype": (list(catalog.DTYPES), dtype)},  # older workflows lack it
        }

    def load_checkpoint(self, ckpt_name: str, model: str, dtype: str = "auto") -> tuple[Any]:
        """Returns the MODEL."""
        return (as_comfy_model(loading.open_model(ckpt_name, model, dtype)),)


class GemmaLoader:
    """Loads the text encoder."""

    TITLE = "Gemma Loader"
    CATEGORY = "ExtraModels/Gemma"
    DESCRIPTION = "Loads the text encoder of Sana, Gemma-2-2b-it."
    RETURN_TYPES = ("GEMMA",)
    FUNCTION = "load_model"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """Returns the inputs, in the order of their widgets."""
        names = [*catalog.TEXT_ENCODERS, catalog.BUNDLED]
        names += [name for kind in loading.TEXT_KINDS for name in host.folder_names(kind, _NETWORK_MARKERS)]
        devices = ["auto", "cpu", "cuda", *(f"cuda:{index}" for index in range(1, torch.cuda.device_count()))]
        dtype = {"default": "default", "tooltip": "default: FP32 on a CPU, else BF16."}
        return {
            "required": {
                "model_name": (list(dict.fromkeys(names)), {"tooltip": "A folder of yours is shown with a slash."}),
                "device": (devices, {"default": "cpu", "tooltip": "auto: where ComfyUI puts text encoders."}),
            },
            "optional": {"dtype": (list(catalog.TEXT_DTYPES), dtype)},
        }

    def load_model(self, model_name: str, device: str, dtype: str = "default") -> tuple[Gemma]:
        """Returns the GEMMA."""
        return (loading.open_text_encoder(model_name, device, dtype),)


class ExtraVAELoader:
    """Loads the autoencoder."""

    TITLE = "ExtraVAELoader"
    CATEGORY = "ExtraModels"
    DESCRIPTION = "Loads Sana's autoencoder, a DC-AE. Large pictures are decoded in tiles by themselves, without seams."
    RETURN_TYPES = ("VAE",)
    FUNCTION = "load_vae"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """Returns the inputs, in the order of their widgets."""
        names = [*catalog.AUTOENCODERS, catalog.BUNDLED, *host.file_names("vae")]
        names += host.folder_names("vae", _NETWORK_MARKERS)
        kind = {
            "default": catalog.DEFAULT_AUTOENCODER_KIND,
            "tooltip": "For a file without its config.json; others know theirs.",
        }
        dtype = {"default": "BF16", "tooltip": "auto: FP32, as SanaPipeline decodes."}
        return {
            "required": {"vae_name": (names,), "vae_type": (list(catalog.AUTOENCODER_KINDS), kind)},
            "optional": {"dtype": (list(catalog.DTYPES), dtype)},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, dtype: str = "auto") -> bool | str:  # noqa: N802
        """Lets the lower-case names of older workflows pass; returns True or what is wrong."""
        known = {name.lower() for name in catalog.DTYPES}
        return dtype.lower() in known or f"{dtype!r} is none of {', '.join(catalog.DTYPES)}"

    def load_vae(self, vae_name: str, vae_type: str, dtype: str = "auto") -> tuple[SanaVAE]:
        """Returns the VAE."""
        return (SanaVAE(loading.open_autoencoder(vae_name, vae_type, dtype.lower())),)
