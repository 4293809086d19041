"""Stand-ins for what ComfyUI's KSampler is made of, by the "sampling" facts of `contract.json`: euler and normal."""

import enum
import itertools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


class ModelType(enum.Enum):
    """Only the kind that Sana is."""

    FLOW = 6


class CONDRegular:
    """A tensor of a conditioning that is repeated to the batch and joined with others of its shape."""

    def __init__(self, cond: Tensor) -> None:
        self.cond = cond

    def process_cond(self, batch_size: int, device: torch.device, **_: Any) -> "CONDRegular":
        return CONDRegular(self.cond.repeat_interleave(batch_size // len(self.cond), 0).to(device))

    def can_concat(self, other: "CONDRegular") -> bool:
        return self.cond.shape == other.cond.shape

    def concat(self, others: list["CONDRegular"]) -> Tensor:
        return torch.cat([self.cond, *(other.cond for other in others)])


class LatentFormat:
    """Scaled inside the sampler, unscaled outside."""

    scale_factor = 1.0

    def process_in(self, latent: Tensor) -> Tensor:
        return latent * self.scale_factor

    def process_out(self, latent: Tensor) -> Tensor:
        return latent / self.scale_factor


class BASE:
    """Settings of a model."""

    unet_config: Mapping[str, Any] = {}
    unet_extra_config: Mapping[str, Any] = {"num_heads": -1}
    sampling_settings: Mapping[str, Any] = {}
    latent_format: Any = LatentFormat
    memory_usage_factor = 2.0
    manual_cast_dtype = None

    def __init__(self, unet_config: Mapping[str, Any]) -> None:
        self.unet_config = {**unet_config, **self.unet_extra_config}
        self.latent_format = self.latent_format()


class Flow(nn.Module):
    """Times of ModelType.FLOW."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.shift, self.multiplier = settings["shift"], settings["multiplier"]

    def sigma(self, timestep: Tensor) -> Tensor:
        share = timestep / self.multiplier
        return self.shift * share / (1 + (self.shift - 1) * share)


class BaseModel(nn.Module):
    """What a sampler calls."""

    def __init__(self, model_config: BASE, model_type: ModelType, device: Any = None) -> None:
        super().__init__()
        assert model_config.unet_config["disable_unet_model_creation"] and model_type is ModelType.FLOW
        self.latent_format = model_config.latent_format
        self.model_sampling = Flow(model_config.sampling_settings)
        self.manual_cast_dtype = model_config.manual_cast_dtype

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        return {"c_crossattn": "CONDCrossAttn"} if kwargs.get("cross_attn") is not None else {}

    def apply_model(
        self, x: Tensor, sigma: Tensor, c_crossattn: Tensor, control: Any = None, **extra: Tensor
    ) -> Tensor:
        dtype = self.diffusion_model.dtype
        out = self.diffusion_model(
            x.to(dtype),
            (sigma * self.model_sampling.multiplier).float(),
            context=c_crossattn.to(dtype),
            control=control,
            transformer_options={},
            **{name: one if one.dtype == torch.long else one.to(dtype) for name, one in extra.items()},
        )
        return x - out.float() * sigma.view(-1, 1, 1, 1)


class ModelPatcher:
    """A model, where it runs, and what was changed of it."""

    def __init__(self, model: nn.Module, load_device: torch.device, offload_device: torch.device) -> None:
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.object_patches: dict[str, Any] = {}

    def load(self) -> None:
        self.model.to(self.load_device)


def modules() -> dict[str, ModuleType]:
    """Returns ComfyUI's modules of models by name."""
    found = {
        "comfy.model_base": {"BaseModel": BaseModel, "ModelType": ModelType},
        "comfy.model_patcher": {"ModelPatcher": ModelPatcher},
        "comfy.latent_formats": {"LatentFormat": LatentFormat},
        "comfy.conds": {"CONDRegular": CONDRegular},
        "comfy.supported_models_base": {"BASE": BASE},
    }
    made = {}
    for name, attributes in found.items():
        made[name] = ModuleType(name)
        made[name].__dict__.update(attributes)
    return made


def sample(
    patcher: ModelPatcher,
    latent: Tensor,
    *,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: list[Any],
    negative: list[Any],
    denoise: float,
) -> Tensor:
    """Returns what KSampler gives for an empty latent: unscaled latents."""
    assert (sampler_name, scheduler, denoise) == ("euler", "normal", 1.0) and not latent.any()
    model = patcher.model
    noise = torch.randn(latent.shape, generator=torch.manual_seed(seed))
    conds = [_encode(model, one) for one in ([positive] if cfg == 1 else [positive, negative])]
    first, last = model.model_sampling.sigma(torch.tensor([1000.0, 1.0])) * 1000
    sigmas = [*model.model_sampling.sigma(torch.linspace(first, last, steps)), torch.tensor(0.0)]
    x = sigmas[0] * noise
    for sigma, following in itertools.pairwise(sigmas):
        denoised = _denoise(model, x, sigma, conds, cfg)
        x = x + (x - denoised) / sigma * (following - sigma)
    return model.latent_format.process_out(x)


def _encode(model: Any, conditioning: list[Any]) -> dict[str, CONDRegular]:
    ((cross_attn, extra),) = conditioning
    return model.extra_conds(cross_attn=cross_attn, device="cpu", prompt_type="any", **extra)


def _denoise(model: Any, x: Tensor, sigma: Tensor, conds: list[dict[str, CONDRegular]], cfg: float) -> Tensor:
    rows = [{name: one.process_cond(len(x), x.device) for name, one in cond.items()} for cond in conds]
    assert all(one.keys() == rows[0].keys() and all(one[k].can_concat(rows[0][k]) for k in one) for one in rows)
    joined = {name: rows[0][name].concat([one[name] for one in rows[1:]]) for name in rows[0]}
    found = model.apply_model(torch.cat([x] * len(rows)), sigma.repeat(len(x) * len(rows)), **joined).chunk(len(rows))
    return found[0] if len(found) == 1 else found[1] + (found[0] - found[1]) * cfg
