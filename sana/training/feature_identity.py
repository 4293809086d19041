"""What decides cached features: hashes and settings of the networks and the transform; refusing a stale cache.

The features themselves are computed in `cache_features.py` and stored by `sana/data/feature_cache.py`.
"""

import hashlib
import json
from typing import Any

import torch

from sana.config import SanaConfig
from sana.config_extra import data_extra
from sana.data.feature_cache import FeatureCache
from sana.models import build_autoencoder, build_text_encoder
from sana.models.autoencoder.base import Autoencoder
from sana.models.text_encoder import PrecomputedTextEncoder, TextEncoder

AnyTextEncoder = TextEncoder | PrecomputedTextEncoder
PROBE = "A probe: two Cats, 3 красных 苹果 — and\n🙂 (tokenised alike?)"


def weights_hash(network: torch.nn.Module | PrecomputedTextEncoder) -> str:
    """SHA-256 of names, shapes and values, rounded to bf16: weights loaded in fp32 and in bf16 have one hash."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        stored = tensor.detach().to("cpu", torch.bfloat16 if tensor.is_floating_point() else None).contiguous()
        digest.update(f"{name} {tuple(stored.shape)};".encode())
        digest.update(stored.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def latents_identity(config: SanaConfig, autoencoder: Autoencoder) -> dict[str, Any]:
    """Everything but the image that decides its latents."""
    multi_scale, resize = config.model.multi_scale, data_extra(config.data.extra).resize
    return {
        "transform": config.data.transform + (f", {resize} resize" if resize != "exact" else ""),
        "image_size": config.model.image_size,
        "multi_scale": multi_scale,
        "aspect_ratio_type": config.model.aspect_ratio_type if multi_scale else None,
        "autoencoder": type(autoencoder).__name__,
        "autoencoder_weights": weights_hash(autoencoder),
        "scaling_factor": float(autoencoder.scaling_factor),
        "shift_factor": float(autoencoder.shift_factor),
        "sample_posterior": bool(getattr(autoencoder, "sample_posterior", False)),
    }


def text_identity(text_encoder: AnyTextEncoder) -> dict[str, Any]:
    """Everything but the caption that decides its features."""
    return {
        "chi_prompt": text_encoder.chi_prompt,
        "model_max_length": text_encoder.model_max_length,
        "text_encoder": type(text_encoder).__name__,
        "text_encoder_weights": weights_hash(text_encoder),
        "tokenizer": _tokenizer_hash(getattr(text_encoder, "tokenizer", None)),
    }


def require_features(
    config: SanaConfig,
    cache: FeatureCache,
    *,
    autoencoder: Autoencoder | None = None,
    text_encoder: AnyTextEncoder | None = None,
) -> None:
    """Refuses a cache that other networks or settings made than a configuration's; call it before training.

    Args:
        config: `data.load_vae_feat` and `data.load_text_feat` say what is compared.
        cache: of `data.extra.feature_dir`.
        autoencoder: the one of the run; loaded for a moment where None is given.
        text_encoder: likewise.

    Raises:
        DataError: the cache is stale; the first difference and what to do are named.
    """
    if config.data.load_vae_feat:
        cache.require({"latents": latents_identity(config, autoencoder or build_autoencoder(config))})
    if config.data.load_text_feat:
        encoder = text_encoder or build_text_encoder(config, dtype=torch.bfloat16)
        cache.require({"text": text_identity(encoder)})


def _tokenizer_hash(tokenizer: Any) -> str:
    if tokenizer is None:
        return ""
    known = [sorted(tokenizer.get_vocab().items()), list(tokenizer.encode(PROBE))]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()
