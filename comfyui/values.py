"""What travels along the links of a graph: the model, the text encoder, conditionings, latents; and their checks."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sana.models.autoencoder.base import Autoencoder
from sana.models.text_encoder import PrecomputedTextEncoder, TextEncoder
from sana.pipelines.sana_pipeline import SanaPipeline
from sana.pipelines.text_features import TextFeatures, stack

Conditioning = list[list[Any]]  # [[embeddings (1, L, C), {"attention_mask": (1, L), ...}], ...]
Latent = dict[str, Any]  # {"samples": (B, C, h, w)}
MASK = "attention_mask"
PADDING = "sana_padding"  # "zero": what the mask hides is zero; "encoded": it is what the encoder made of padding
KNOWN = frozenset({MASK, PADDING, "pooled_output", "img_hw", "aspect_ratio"})


@dataclass(frozen=True, eq=False)
class SanaModel:
    """A transformer that is ready to sample.

    Attributes:
        pipeline: holds it; its autoencoder is a `LatentShape`, and it never encodes a text.
        scaling_factor, shift_factor: of the autoencoder that the model was trained with: ComfyUI's latents are
            unscaled ones.
        name: for messages.
    """

    pipeline: SanaPipeline
    scaling_factor: float
    shift_factor: float
    name: str

    @property
    def latent_channels(self) -> int:
        """C of the latents."""
        return self.pipeline.autoencoder.latent_channels

    @property
    def caption_channels(self) -> int:
        """Numbers a token of the text."""
        return self.pipeline.config.text_encoder.caption_channels

    def unscaled(self, latents: Tensor) -> Tensor:
        """Returns what the autoencoder's network reads: the arithmetic of `Autoencoder.decode`, to the bit."""
        return latents / self.scaling_factor + self.shift_factor


class LatentShape(Autoencoder):
    """Stands for an autoencoder where only the shape of its latents is asked for; it has no weights.

    Args:
        latent_channels: C.
        downsample_factor: pixels a latent pixel.
    """

    def __init__(self, latent_channels: int, downsample_factor: int) -> None:
        super().__init__()
        self.latent_channels, self.downsample_factor = latent_channels, downsample_factor
        self.scaling_factor = 1.0


@dataclass(frozen=True, eq=False)
class Gemma:
    """A text encoder and what it remembers of encoded texts."""

    encoder: TextEncoder | PrecomputedTextEncoder
    features: TextFeatures = field(default_factory=TextFeatures)

    def conditioning(self, text: str, *, null: bool) -> Conditioning:
        """Returns a text as a conditioning, padded to the length that the image model was trained with.

        Args:
            text: used as it is.
            null: without the instruction, as negative prompts are encoded; their padding is kept, since it is read
                under the prompt's mask.
        """
        features = self.features.find(self.encoder, [text], null=null, device=torch.device("cpu"))
        found = stack(features, self.encoder.model_max_length)
        return [[found.embeds, {MASK: found.mask, PADDING: "encoded" if null else "zero"}]]


def require_gemma(value: object) -> Gemma:
    """Returns `value`.

    Raises:
        ValueError: it is not what `GemmaLoader` of this pack gives.
    """
    if not isinstance(value, Gemma):
        raise ValueError(
            f"The GEMMA of another node pack ({type(value).__name__}) came in; use the GemmaLoader of Sana's pack, and "
            "remove ExtraModels if both are installed."
        )
    return value


def read_conditioning(conditioning: Conditioning, name: str, channels: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Returns embeddings (1, L, C), mask (1, L) and the rest of a conditioning.

    Args:
        conditioning: as `SanaTextEncode` or `GemmaTextEncode` made it.
        name: "positive" or "negative", for messages.
        channels: C that the model reads.

    Raises:
        ValueError: it is of another kind, or says something that `SanaSampler` does not follow.
    """
    if len(conditioning) != 1:
        raise ValueError(f"SanaSampler reads one text as {name}, and {len(conditioning)} were combined; give one.")
    embeds, extra = conditioning[0]
    if MASK not in extra or embeds.ndim != 3 or len(embeds) != 1:
        raise ValueError(
            f"The {name} conditioning carries no mask of its tokens: encode the text with SanaTextEncode or "
            "GemmaTextEncode."
        )
    if embeds.shape[2] != channels:
        raise ValueError(
            f"The {name} text was encoded with {embeds.shape[2]} numbers a token and this model reads {channels}: "
            "choose the text encoder of this model in GemmaLoader."
        )
    strangers = sorted(key for key, value in extra.items() if key not in KNOWN and value is not None)
    if strangers:
        raise ValueError(
            f"SanaSampler does not follow {', '.join(strangers)} of the {name} conditioning; use KSampler."
        )
    return embeds, extra[MASK], extra


def read_empty_latent(latent: Latent, model: SanaModel) -> Tensor:
    """Returns the samples of a LATENT that only gives the size.

    Raises:
        ValueError: it has the wrong shape, holds a picture, or has a mask.
    """
    samples = latent["samples"]
    if samples.ndim != 4 or samples.shape[1] != model.latent_channels:
        raise ValueError(
            f"{model.name} makes latents of {model.latent_channels} channels and this LATENT has the shape "
            f"{tuple(samples.shape)}; use EmptySanaLatentImage."
        )
    if torch.count_nonzero(samples) or latent.get("noise_mask") is not None:
        raise ValueError(
            "SanaSampler starts from noise and this LATENT holds a picture or a mask; use EmptySanaLatentImage, or "
            "KSampler for image to image."
        )
    return samples
