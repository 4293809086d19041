"""Tables of networks by their official names, and the functions that build one from a config. No layer is here."""

from typing import TYPE_CHECKING, Any

from sana.registry import Registry

if TYPE_CHECKING:
    import torch

    from sana.config import SanaConfig
    from sana.models.autoencoder.base import Autoencoder
    from sana.models.text_encoder.base import TextEncoder
    from sana.models.text_encoder.precomputed import PrecomputedTextEncoder
    from sana.models.transformer.sana import Sana

_SANA = "sana.models.transformer.sana"
_CM = "sana.models.transformer.sana_cm"
_CONTROLNET = "sana.models.transformer.controlnet"

TRANSFORMERS = Registry(
    "transformer",
    {
        "Sana_600M_P1_D28": f"{_SANA}:Sana_600M_P1_D28",
        "Sana_1600M_P1_D20": f"{_SANA}:Sana_1600M_P1_D20",
        "SanaMS_600M_P1_D28": f"{_SANA}:SanaMS_600M_P1_D28",
        "SanaMS_600M_P2_D28": f"{_SANA}:SanaMS_600M_P2_D28",
        "SanaMS_600M_P4_D28": f"{_SANA}:SanaMS_600M_P4_D28",
        "SanaMS_1600M_P1_D20": f"{_SANA}:SanaMS_1600M_P1_D20",
        "SanaMS_1600M_P2_D20": f"{_SANA}:SanaMS_1600M_P2_D20",
        "SanaMS_2400M_P1_D30": f"{_SANA}:SanaMS_2400M_P1_D30",
        "SanaMS_3200M_P1_D40": f"{_SANA}:SanaMS_3200M_P1_D40",
        "SanaMS_4800M_P1_D60": f"{_SANA}:SanaMS_4800M_P1_D60",
        "SanaMS1.5_1600M_P1_D20": f"{_SANA}:SanaMS_1600M_P1_D20",
        "SanaMS1.5_3200M_P1_D40": f"{_SANA}:SanaMS_3200M_P1_D40",
        "SanaMS1.5_4800M_P1_D60": f"{_SANA}:SanaMS_4800M_P1_D60",
        "SanaMS_Tiny_P1": f"{_SANA}:SanaMS_Tiny_P1",
        "SanaMSCM_600M_P1_D28": f"{_CM}:SanaMSCM_600M_P1_D28",
        "SanaMSCM_1600M_P1_D20": f"{_CM}:SanaMSCM_1600M_P1_D20",
        "SanaMSCM_2400M_P1_D30": f"{_CM}:SanaMSCM_2400M_P1_D30",
        "SanaMSCM_Tiny_P1": f"{_CM}:SanaMSCM_Tiny_P1",
        "SanaMSControlNet_600M_P1_D28": f"{_CONTROLNET}:SanaMSControlNet_600M_P1_D28",
        "SanaMSControlNet_1600M_P1_D20": f"{_CONTROLNET}:SanaMSControlNet_1600M_P1_D20",
    },
)
AUTOENCODERS = Registry(
    "autoencoder",
    {
        "AutoencoderDC": "sana.models.autoencoder.dc_ae:DCAE",
        "dc-ae": "sana.models.autoencoder.dc_ae:DCAE",
        "AutoencoderKL": "sana.models.autoencoder.kl:KLAutoencoder",
        "sdxl": "sana.models.autoencoder.kl:KLAutoencoder",
        "sd3": "sana.models.autoencoder.kl:KLAutoencoder",
    },
)
TEXT_ENCODERS = Registry(  # by the model_type of transformers; official names are in text_encoder/load.py
    "text encoder",
    {
        "gemma": "sana.models.text_encoder.gemma:GemmaTextEncoder",
        "gemma2": "sana.models.text_encoder.gemma:Gemma2TextEncoder",
        "qwen2": "sana.models.text_encoder.qwen:Qwen2TextEncoder",
        "t5": "sana.models.text_encoder.t5:T5TextEncoder",
    },
)


def build_transformer(config: "SanaConfig", **overrides: object) -> "Sana":
    """Builds the transformer that a config names, with fresh weights, on the default device.

    Args:
        config: the whole config; its sections model, vae, text_encoder and scheduler are read.
        **overrides: constructor arguments that take precedence, such as `clip_fp16`.

    Returns:
        The network, with float32 attention and without gradient checkpointing unless the config asks otherwise.
    """
    network = TRANSFORMERS[config.model.model](**{**transformer_arguments(config), **overrides})
    if config.model.fp32_attention:
        from sana.models.transformer.attention import set_fp32_attention

        set_fp32_attention(network)
    train = getattr(config, "train", None)
    network.gradient_checkpointing = bool(getattr(train, "grad_checkpointing", False))
    return network


def transformer_arguments(config: "SanaConfig") -> dict[str, object]:
    """Returns the constructor arguments that a config implies for its transformer; the preset adds depth and width."""
    model, vae, text, scheduler = config.model, config.vae, config.text_encoder, config.scheduler
    arguments = {
        "input_size": model.image_size // vae.vae_downsample_rate,
        "in_channels": vae.vae_latent_dim,
        "pe_interpolation": model.pe_interpolation,
        "model_max_length": text.model_max_length,
        "caption_channels": text.caption_channels,
        "y_norm": text.y_norm,
        "y_norm_scale_factor": text.y_norm_scale_factor,
        "class_dropout_prob": model.class_dropout_prob,
        "qk_norm": model.qk_norm,
        "cross_norm": model.cross_norm,
        "attn_type": model.attn_type,
        "cross_attn_type": model.cross_attn_type,
        "linear_head_dim": model.linear_head_dim,
        "ffn_type": model.ffn_type,
        "mlp_ratio": model.mlp_ratio,
        "mlp_acts": list(model.mlp_acts),
        "use_pe": model.use_pe,
        "pos_embed_type": model.pos_embed_type,
        "pred_sigma": scheduler.pred_sigma,
        "learn_sigma": scheduler.learn_sigma and scheduler.pred_sigma,
        "timestep_norm_scale_factor": scheduler.timestep_norm_scale_factor,
        "cfg_embed": model.cfg_embed,
        "cfg_embed_scale": model.cfg_embed_scale,
        "logvar": model.logvar,
        "micro_condition": model.micro_condition,
    }
    if model.model.endswith("_Tiny_P1") and isinstance(model.extra, dict):  # the released presets have fixed sizes
        arguments |= {key: model.extra[key] for key in ("depth", "hidden_size", "num_heads") if key in model.extra}
    return arguments


def build_autoencoder(config: "SanaConfig", *, dtype: "torch.dtype | None" = None, **options: Any) -> "Autoencoder":
    """Loads the autoencoder that `config.vae` names, in eval mode.

    Args:
        config: the whole config; its section vae is read.
        dtype: dtype of the weights; None takes `vae.weight_dtype`.
        **options: `device` and `mapped` of `load_autoencoder`.

    Raises:
        ConfigError: what was loaded is not what the config's vae section describes.
        CheckpointError: the folder is no autoencoder.
        FetchError: it could not be had.
    """
    from sana.config import ConfigError
    from sana.models.autoencoder.loading import load_autoencoder
    from sana.utils.dtype import parse_dtype

    vae = config.vae
    network = AUTOENCODERS[vae.vae_type]
    autoencoder = load_autoencoder(
        vae.vae_pretrained,
        dtype=parse_dtype(vae.weight_dtype) if dtype is None else dtype,
        sample_posterior=vae.sample_posterior,
        **options,
    )
    if not isinstance(autoencoder, network):
        raise ConfigError(
            f"vae.vae_type is {vae.vae_type!r}, and vae.vae_pretrained {vae.vae_pretrained} holds a "
            f"{type(autoencoder).__name__}: change one of them."
        )
    described = {"vae_latent_dim": autoencoder.latent_channels, "vae_downsample_rate": autoencoder.downsample_factor}
    for key, actual in described.items():
        if getattr(vae, key) != actual:
            raise ValueError(
                f"vae.{key} is {getattr(vae, key)}, and the autoencoder {vae.vae_pretrained} has {actual}."
            )
    return autoencoder


def build_text_encoder(
    config: "SanaConfig", *, dtype: "torch.dtype | None" = None, **options: Any
) -> "TextEncoder | PrecomputedTextEncoder":
    """Loads the text encoder that `config.text_encoder` names.

    Args:
        config: the whole config; its section text_encoder is read.
        dtype: dtype of the weights; None means float32.
        **options: `device`, `quantization` and `runs_on` of `load_text_encoder`.
    """
    import torch

    from sana.models.text_encoder import load_text_encoder

    text = config.text_encoder
    return load_text_encoder(
        text.text_encoder_name,
        dtype=dtype or torch.float32,
        model_max_length=text.model_max_length,
        chi_prompt=text.chi_prompt,
        **options,
    )
