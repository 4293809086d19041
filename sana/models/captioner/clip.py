"""How well captions describe images, by CLIP. Files are not written here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sana.models.captioner.loading import find_model_folder, load_part
from sana.models.checkpoint import CheckpointError


class ClipScorer:
    """CLIP score: 100 * max(cos(image embedding, text embedding), 0), as in the score files of the official data.

    Texts longer than the model reads (77 tokens for CLIP) are cut, so the score of a long caption is that of its start.

    Args:
        model: gives `image_embeds` and `text_embeds` (CLIP, SigLIP and others).
        processor: of images and text.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        text = getattr(model.config, "text_config", model.config)
        self.max_length = int(getattr(text, "max_position_embeddings", 77))

    @torch.inference_mode()
    def score(self, images: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> list[list[float]]:
        """Scores every caption of every image.

        Args:
            images: B RGB images.
            captions: B lists of captions.

        Returns:
            B lists of scores in [0, 100].
        """
        texts = [caption for group in captions for caption in group]
        if not texts:
            return [[] for _ in images]
        inputs = self.processor(
            images=list(images),
            text=texts,
            return_tensors="pt",
            padding="max_length" if self.model.config.model_type.startswith("siglip") else True,
            truncation=True,
            max_length=self.max_length,
        ).to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        output = self.model(**inputs)
        seen, said = _normalised(output.image_embeds), _normalised(output.text_embeds)
        owner = torch.tensor([row for row, group in enumerate(captions) for _ in group], device=seen.device)
        scores = iter((100 * (seen[owner] * said).sum(dim=-1)).clamp(min=0).tolist())
        return [[next(scores) for _ in group] for group in captions]


def _normalised(embeds: Tensor) -> Tensor:
    return torch.nn.functional.normalize(embeds.float(), dim=-1)


def load_clip(
    reference: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> ClipScorer:
    """Loads a CLIP-like model from a local folder, hub id or hf:// reference.

    Raises:
        CheckpointError: the folder holds no model of images and texts.
        FetchError: it cannot be had.
    """
    import transformers

    folder = find_model_folder(reference)
    config = load_part("configuration", folder, transformers.AutoConfig.from_pretrained)
    if not (hasattr(config, "text_config") and hasattr(config, "vision_config")):
        raise CheckpointError(f"{folder} holds a {config.model_type} model; CLIP has an image and a text tower.")
    model = load_part("CLIP model", folder, transformers.AutoModel.from_pretrained, dtype=dtype)
    processor = load_part("processor", folder, transformers.AutoProcessor.from_pretrained)
    return ClipScorer(model.to(device).eval(), processor)
