"""ComfyUI's own model object around a Sana transformer, so that its KSampler and its memory manager can use it.

Its classes are made at call time, since ComfyUI's modules are there only then. `SanaSampler` does not go through them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import host
from .values import MASK, SanaModel

TIMESTEPS = 1000  # the transformer sees sigma in [0, 1] as a timestep in [0, 1000]


class Velocity(nn.Module):
    """A transformer in the form in which ComfyUI calls a diffusion model.

    Args:
        transformer: of a flow: it predicts noise minus latents.
        channels: of the latents.
        dtype: what it computes in.
    """

    def __init__(self, transformer: nn.Module, channels: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.transformer, self.channels, self.dtype = transformer, channels, dtype

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        attention_mask: Tensor | None = None,
        control: Any = None,
        **_: Any,
    ) -> Tensor:
        """Returns the velocity (B, C, h, w).

        Args:
            x: (B, C, h, w) scaled latents in the network's dtype.
            timesteps: (B,) in [0, 1000].
            context: (B, L, D) embeddings.
            attention_mask: (B, L), each row that of its own text.
            control: must be None.

        Raises:
            ValueError: the mask is missing or of another length, or a control network is attached.
        """
        if context is None or attention_mask is None:
            raise ValueError("This conditioning carries no mask of its tokens: encode the text with SanaTextEncode.")
        if attention_mask.shape != context.shape[:2]:
            raise ValueError(
                "The texts of this conditioning were joined, and a Sana model reads one: encode them as one."
            )
        if control is not None:
            raise ValueError("ComfyUI's control networks cannot take effect in a Sana model; remove Apply ControlNet.")
        if any(parameter.device != x.device for parameter in self.transformer.parameters()):
            self.transformer.to(x.device)  # ComfyUI loads parts where memory is short, and only its own layers follow
        output = self.transformer(x, timesteps.float(), context[:, None].to(x.dtype), mask=attention_mask)
        return output[:, : self.channels]


def as_comfy_model(sana: SanaModel) -> Any:
    """Returns ComfyUI's MODEL: a ModelPatcher around the transformer, or `sana` itself where ComfyUI is not running."""
    patchers, bases = host.module("comfy.model_patcher"), host.module("comfy.model_base")
    if patchers is None or bases is None:
        return sana
    model = _make_base_model(sana, bases)
    return patchers.ModelPatcher(model, load_device=host.device(), offload_device=host.resting_device())


def ready_model(model: Any) -> SanaModel:
    """Returns the Sana model of a MODEL, its weights where they compute.

    Raises:
        ValueError: it is another model, or it was changed in a way that `SanaSampler` does not follow.
    """
    if isinstance(model, SanaModel):
        return model
    sana = getattr(getattr(model, "model", None), "sana", None)
    if not isinstance(sana, SanaModel):
        raise ValueError("SanaSampler samples models of SanaCheckpointLoader; this MODEL is another one.")
    options: Mapping[str, Any] = getattr(model, "model_options", {})
    changes = [name for name, value in options.items() if value and name != "transformer_options"]
    changes += [name for name in ("patches", "patches_replace") if options.get("transformer_options", {}).get(name)]
    changes += [*getattr(model, "object_patches", {})]
    if changes:
        raise ValueError(f"SanaSampler does not follow the patches {', '.join(changes)} of this MODEL; use KSampler.")
    host.module("comfy.model_management").load_models_gpu([model])
    pipeline = sana.pipeline
    pipeline.device = torch.device(model.load_device)
    assert pipeline.transformer is not None
    if any(parameter.device != pipeline.device for parameter in pipeline.transformer.parameters()):
        pipeline.transformer.to(pipeline.device)
    return sana


def _make_base_model(sana: SanaModel, bases: Any) -> nn.Module:
    """ComfyUI's BaseModel with a transformer that is already loaded; texts are read under their own masks."""
    formats: Any = host.module("comfy.latent_formats")
    settings: Any = host.module("comfy.supported_models_base")
    conds: Any = host.module("comfy.conds")
    pipeline = sana.pipeline

    class SanaLatents(formats.LatentFormat):
        scale_factor = sana.scaling_factor
        latent_channels = sana.latent_channels
        spacial_downscale_ratio = pipeline.autoencoder.downsample_factor

    class SanaSettings(settings.BASE):
        unet_config = {"disable_unet_model_creation": True}  # noqa: RUF012  as ComfyUI declares it
        unet_extra_config: dict[str, Any] = {}  # noqa: RUF012
        sampling_settings = {"shift": pipeline.config.scheduler.flow_shift, "multiplier": TIMESTEPS}  # noqa: RUF012
        latent_format = SanaLatents

    class SanaBaseModel(bases.BaseModel):
        def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
            out = super().extra_conds(**kwargs)
            if kwargs.get("cross_attn") is not None:  # not CONDCrossAttn: repeated tokens would need repeated masks
                out["c_crossattn"] = conds.CONDRegular(kwargs["cross_attn"])
            if kwargs.get(MASK) is not None:
                out[MASK] = conds.CONDRegular(kwargs[MASK])
            return out

    model = SanaBaseModel(SanaSettings(SanaSettings.unet_config), model_type=bases.ModelType.FLOW)
    assert pipeline.transformer is not None
    model.diffusion_model = Velocity(pipeline.transformer, sana.latent_channels, pipeline.dtype)
    model.sana = sana
    return model
