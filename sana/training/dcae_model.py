"""The autoencoder that a run trains: where it comes from, which part is the encoder, and how it is written.

Networks and their files are in `sana/models/autoencoder`; the training loop is in `dcae_trainer.py`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sana.models.autoencoder.base import Autoencoder
from sana.models.autoencoder.dc_ae import DCAE, DCAEConfig
from sana.models.autoencoder.loading import load_autoencoder, save_autoencoder

CLOSING_LAYERS = ("decoder.project_out", "encoder.project_in", "conv_in", "conv_out")  # AdamW's; the rest may be Muon's


def initial_autoencoder(pretrained: str | Path | None, shape: Mapping[str, Any], residual_gain: float) -> Autoencoder:
    """Loads an autoencoder in fp32, or makes a fresh DC-AE from the fields of `DCAEConfig`.

    Raises:
        ValueError: the shape is impossible.
        CheckpointError: nothing readable is there.
    """
    if pretrained is not None:
        return load_autoencoder(pretrained, dtype=torch.float32).train()
    autoencoder = DCAE(DCAEConfig(**shape))
    for name, parameter in autoencoder.named_parameters():
        if name.endswith("norm.weight"):  # closes a residual branch: activations of a fresh stack grow without it
            nn.init.constant_(parameter, residual_gain)
    return autoencoder


def encoder_of(autoencoder: Autoencoder) -> nn.Module:
    """The network whose stages give features: DC-AE's encoder or AutoencoderKL's."""
    return _network(autoencoder).encoder


def encoder_parts(autoencoder: Autoencoder) -> list[nn.Module]:
    """Everything between image and latents."""
    network = _network(autoencoder)
    return [part for name in ("encoder", "quant_conv") if (part := getattr(network, name, None)) is not None]


def freeze_encoder(autoencoder: Autoencoder) -> None:
    """No part of the encoder learns, and its running statistics (where a norm has them) stay as they are."""
    for part in encoder_parts(autoencoder):
        part.requires_grad_(False).eval()


def last_layer(autoencoder: Autoencoder) -> nn.Parameter:
    """Weight of the decoder's last convolution."""
    return [parameter for parameter in _network(autoencoder).decoder.parameters() if parameter.ndim == 4][-1]


def storage_dtype(autoencoder: Autoencoder, *, pretrained: bool, frozen: bool) -> torch.dtype:
    """bf16 where nothing is lost by it: a model trained anew, or a frozen encoder that is bf16 already; else fp32."""
    if not pretrained or (frozen and rounds_exactly(autoencoder, torch.bfloat16)):
        return torch.bfloat16
    return torch.float32


def rounds_exactly(autoencoder: Autoencoder, dtype: torch.dtype) -> bool:
    """Whether the encoder's weights, so the latents of every image, survive being stored in a dtype."""
    tensors = [tensor for part in encoder_parts(autoencoder) for tensor in part.state_dict().values()]
    return all(torch.equal(tensor, tensor.to(dtype).to(tensor.dtype)) for tensor in tensors)


def write_autoencoder(autoencoder: Autoencoder, folder: Path, dtype: torch.dtype) -> None:
    """Writes a folder that `load_autoencoder` reads, in the kind's own format; an AutoencoderKL in diffusers'."""
    if isinstance(autoencoder, DCAE):
        save_autoencoder(autoencoder, folder, dtype=dtype)
        return
    network = _network(autoencoder)
    network.register_to_config(scaling_factor=autoencoder.scaling_factor)
    temporary = folder.with_name(f".{folder.name}.part")
    state = {name: tensor.detach().cpu().to(dtype) for name, tensor in network.state_dict().items()}
    network.save_pretrained(temporary, state_dict=state)
    folder.mkdir(parents=True, exist_ok=True)
    for path in temporary.iterdir():
        os.replace(path, folder / path.name)
    temporary.rmdir()


@torch.no_grad()
def latent_deviation_of(autoencoder: Autoencoder, images: Tensor) -> float:
    """Standard deviation of the raw latents of images; its inverse is the scaling factor of a new autoencoder."""
    device = next(autoencoder.parameters()).device
    return torch.cat([autoencoder.raw_encode(batch.to(device)) for batch in images.split(8)]).std().item()


def _network(autoencoder: Autoencoder) -> nn.Module:
    return autoencoder if isinstance(autoencoder, DCAE) else autoencoder.model
