"""Our networks with random weights, and diffusers' with the same ones. Nothing is timed here."""

import functools
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sana.models.autoencoder.dc_ae import DCAE, DCAEConfig
from sana.models.autoencoder.dc_ae_keys import config_to_diffusers, to_diffusers_state_dict
from sana.models.diffusers_config import model_type_arch, transformer_config
from sana.models.diffusers_keys import to_diffusers
from sana.models.transformer.sana import SanaMS
from tools.bench.harness import Skip

MODEL_TYPES = {"0.6B": "SanaMS_600M_P1_D28", "1.6B": "SanaMS_1600M_P1_D20"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TEXT_TOKENS, REAL_TOKENS = 300, 60
CUT_TOKENS = 64  # the real ones, up to a multiple of 64
STEPS = 20
FEED_FORWARD_GAIN = 64  # with which attention, cross-attention and Mix-FFN change the result about equally


def require_diffusers() -> None:
    """Raises `Skip` where diffusers is not installed."""
    if importlib.util.find_spec("diffusers") is None:
        raise Skip('diffusers is not installed: pip install "sana-python[diffusers]"')


def usable_triton(device: str) -> bool:
    """Whether Triton's kernels can run on a device of this type."""
    return device != "cpu" and importlib.util.find_spec("triton") is not None


def transformer_arguments(model: str, pixels: int, depth: int | None = None) -> dict[str, Any]:
    """Constructor arguments of an official network.

    Args:
        model: a key of `MODEL_TYPES`.
        pixels: image size; 512, 1024, 2048 or 4096.
        depth: fewer blocks than the official number.
    """
    arguments = dict(model_type_arch(MODEL_TYPES[model], pixels)["kwargs"])
    return arguments | ({"depth": depth} if depth else {})


def random_transformer(arguments: dict[str, Any], device: str, dtype: torch.dtype, seed: int = 0) -> SanaMS:
    """Our network, in evaluation mode, with weights that make every part of it matter to the result.

    At the start of training gates and the caption norm are almost zero: a comparison would hardly see the blocks.
    """
    torch.manual_seed(seed)
    with torch.device(device):
        model = SanaMS(**arguments)
        for name, parameter in model.named_parameters():
            if name.endswith("scale_shift_table"):
                nn.init.normal_(parameter, std=0.3)
            elif name == "attention_y_norm.weight":
                nn.init.ones_(parameter)
            elif name.endswith("point_conv.conv.weight"):
                parameter.data.mul_(FEED_FORWARD_GAIN)
            elif name == "final_layer.linear.weight":
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            elif name.endswith("bias"):
                nn.init.normal_(parameter, std=0.02)
    return model.to(dtype).eval().requires_grad_(False)


def fastest(model: SanaMS) -> SanaMS:
    """The same network by Triton's kernels, where they can run."""
    if usable_triton(next(model.parameters()).device.type):
        from sana.models.transformer.attention import set_backend

        set_backend(model, "triton")
    return model


def diffusers_transformer(model: SanaMS) -> Any:
    """diffusers' network with copies of our weights, on the same device and in the same dtype."""
    require_diffusers()
    from diffusers import SanaTransformer2DModel

    state = model.state_dict()
    config = transformer_config(model.init_kwargs, state)
    weights = {key: tensor.clone() for key, tensor in to_diffusers(state)[0].items()}
    device = next(model.parameters()).device
    with torch.device(device if config["interpolation_scale"] is not None else "meta"):  # it has a table to fill
        theirs = SanaTransformer2DModel.from_config(config)
    if "patch_embed.pos_embed" in theirs.state_dict():
        weights["patch_embed.pos_embed"] = theirs.patch_embed.pos_embed
    theirs.load_state_dict(weights, assign=True)
    return theirs.to(device).eval().requires_grad_(False)


def exact_convolutions() -> AbstractContextManager[None]:
    """cuDNN rounds the factors of float32 convolutions to TF32 unless told otherwise; matrix products do not."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def random_autoencoder(config: DCAEConfig, device: str, dtype: torch.dtype, seed: int = 0) -> DCAE:
    """Our DC-AE with random weights."""
    torch.manual_seed(seed)
    with torch.device(device):
        return DCAE(config).to(dtype).eval().requires_grad_(False)


def diffusers_autoencoder(autoencoder: DCAE) -> Any:
    """diffusers' DC-AE with copies of our weights."""
    require_diffusers()
    from diffusers import AutoencoderDC

    with torch.device("meta"):
        theirs = AutoencoderDC.from_config(config_to_diffusers(autoencoder.config))
    weights = to_diffusers_state_dict(autoencoder.state_dict())
    theirs.load_state_dict({key: tensor.clone() for key, tensor in weights.items()}, assign=True)
    return theirs.eval().requires_grad_(False)


@dataclass(frozen=True)
class Inputs:
    """What a denoiser sees: latents, one timestep for each of 20 steps, text of 300 tokens with 60 real ones."""

    latents: Tensor  # (B, 32, h, w)
    timesteps: list[Tensor]  # (B,) each
    text: Tensor  # (B, L, C)
    mask: Tensor  # (B, L) int64


def random_inputs(arguments: dict[str, Any], batch: int, pixels: int, device: str, dtype: torch.dtype) -> Inputs:
    """Inputs for an image of `pixels` squared."""
    generator = torch.Generator(device).manual_seed(1)
    side = pixels // 32
    shape = (batch, arguments["in_channels"], side, side)
    latents = torch.randn(shape, generator=generator, device=device)
    text = torch.randn(batch, TEXT_TOKENS, arguments["caption_channels"], generator=generator, device=device)
    mask = (torch.arange(TEXT_TOKENS, device=device) < REAL_TOKENS).long().expand(batch, -1).contiguous()
    times = torch.linspace(999, 50, STEPS, device=device).long()
    return Inputs(latents.to(dtype), [time.expand(batch) for time in times], text.to(dtype), mask)


class CachedDenoiser:
    """Our network as a sampler calls it: text and times prepared once for all steps.

    Args:
        model: the network.
        inputs: what it sees.
    """

    def __init__(self, model: SanaMS, inputs: Inputs) -> None:
        self.model, self.inputs = model, inputs
        self.prepare()

    @torch.inference_mode()
    def prepare(self) -> None:
        """Everything that is done once for a prompt and a schedule."""
        inputs = self.inputs
        text, mask = inputs.text, inputs.mask
        if text.device.type != "cpu":  # as the pipeline does before it leaves the host
            text, mask = text[:, :CUT_TOKENS], mask[:, :CUT_TOKENS]
        self._text = self.model.cache_text(text, mask)
        self._times = self.model.cache_time(torch.stack([time[0] for time in inputs.timesteps]))

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        """One step, the middle one."""
        return self.model.denoise(self.inputs.latents, self._times[STEPS // 2], self._text)


def diffusers_step(theirs: Any, inputs: Inputs) -> Callable[[], Tensor]:
    """One step of diffusers' network, the middle one."""
    timestep, mask = inputs.timesteps[STEPS // 2], inputs.mask

    @torch.inference_mode()
    def run() -> Tensor:
        return theirs(
            inputs.latents, inputs.text, timestep, encoder_attention_mask=mask, return_dict=False
        )[0]  # fmt: skip

    return run


def exact_step(model: SanaMS, inputs: Inputs) -> Tensor:
    """The same step in float32 by the plain forward, the judge of 16-bit results."""
    with torch.device(inputs.latents.device):
        wide = SanaMS(**model.init_kwargs).eval()
    wide.load_state_dict(model.state_dict())
    with torch.inference_mode(), exact_convolutions():
        text = inputs.text.float()[:, None]
        return wide(inputs.latents.float(), inputs.timesteps[STEPS // 2], text, inputs.mask)


@functools.cache
def forward_flops(model: str, pixels: int, depth: int | None = None) -> float:
    """Operations (2 x MAC) of one forward of one image, text projections of all 300 tokens included."""
    arguments = transformer_arguments(model, pixels, depth)
    dim, layers, side = arguments["hidden_size"], arguments["depth"], pixels // 32
    tokens, hidden = side * side, int(arguments["mlp_ratio"] * dim)
    head = arguments["linear_head_dim"]
    linear = tokens * dim * (3 * dim + dim + 2 * dim)  # qkv, proj, q and proj of the cross-attention
    attention = 2 * tokens * dim * head + 2 * tokens * dim * TEXT_TOKENS
    feed_forward = tokens * (dim * 2 * hidden + 2 * hidden * 9 + hidden * dim)
    text = TEXT_TOKENS * dim * 2 * dim
    caption = TEXT_TOKENS * (arguments["caption_channels"] * dim + dim * dim)
    ends = 2 * tokens * dim * arguments["in_channels"]
    return 2.0 * (layers * (linear + attention + feed_forward + text) + caption + ends)
