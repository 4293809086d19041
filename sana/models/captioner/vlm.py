"""Captioning images with any vision-language model of transformers. Files are not written here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sana.models.captioner.loading import find_model_folder, load_part
from sana.models.checkpoint import CheckpointError

INSTRUCTION = "Describe this image in one detailed paragraph."


class Captioner:
    """A vision-language model that describes images, without sampling: the same image gives the same caption.

    Chat models (those with a chat template) get an image and the instruction; others get the image, and the instruction
    as the beginning of the caption where one is given.

    Args:
        model: has `generate`.
        processor: of images and text.
        instruction: None takes `INSTRUCTION` for chat models, and nothing for others.
        max_new_tokens: longest caption.
    """

    def __init__(
        self, model: Any, processor: Any, *, instruction: str | None = None, max_new_tokens: int = 256
    ) -> None:
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        self.is_chat = bool(getattr(processor, "chat_template", None))
        self.instruction = instruction if instruction is not None else INSTRUCTION if self.is_chat else ""
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is not None and not getattr(model.config, "is_encoder_decoder", False):
            tokenizer.padding_side = "left"  # text is continued at its right end
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    @torch.inference_mode()
    def caption(self, images: Sequence[Image.Image]) -> list[str]:
        """Describes RGB images, all at once.

        Returns:
            One caption for each, on one line.
        """
        inputs = self._inputs(list(images)).to(self.model.device)
        inputs = {
            name: value.to(self.model.dtype) if torch.is_tensor(value) and value.is_floating_point() else value
            for name, value in inputs.items()
        }
        tokens = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        given = inputs.get("input_ids")
        if self.is_chat and given is not None and torch.equal(tokens[:, : given.shape[1]], given):
            tokens = tokens[:, given.shape[1] :]
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def _inputs(self, images: list[Image.Image]) -> Any:
        if self.is_chat:
            content = [{"type": "image"}, {"type": "text", "text": self.instruction}]
            text = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            rows = [[image] for image in images]
            return self.processor(images=rows, text=[text] * len(images), return_tensors="pt", padding=True)
        if self.instruction:
            texts = [self.instruction] * len(images)
            return self.processor(images=images, text=texts, return_tensors="pt", padding=True)
        return self.processor(images=images, return_tensors="pt")


class EncoderDecoderProcessor:
    """The two parts of a vision-encoder-decoder model as one: an image processor before it, a tokenizer after it."""

    chat_template = None

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        self.image_processor, self.tokenizer = image_processor, tokenizer

    def __call__(self, images: Sequence[Image.Image], text: Any = None, **options: Any) -> Any:
        if text is not None:
            raise ValueError("This model takes no instruction: leave --prompt away.")
        return self.image_processor(images=images, return_tensors="pt")

    def batch_decode(self, tokens: torch.Tensor, **options: Any) -> list[str]:
        return self.tokenizer.batch_decode(tokens, **options)


def load_captioner(
    reference: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    instruction: str | None = None,
    max_new_tokens: int = 256,
) -> Captioner:
    """Loads a vision-language model.

    Args:
        reference: local folder, hub id or hf:// reference of an image-text-to-text or vision-encoder-decoder model.
        dtype: of the weights.
        device: where it runs.
        instruction: see `Captioner`.
        max_new_tokens: longest caption.

    Raises:
        CheckpointError: the folder holds no such model.
        FetchError: it cannot be had.
    """
    import transformers

    folder = find_model_folder(reference)
    config = load_part("configuration", folder, transformers.AutoConfig.from_pretrained)
    if config.model_type == "vision-encoder-decoder":
        model_class = transformers.VisionEncoderDecoderModel
        processor: Any = EncoderDecoderProcessor(
            load_part("image processor", folder, transformers.AutoImageProcessor.from_pretrained),
            load_part("tokenizer", folder, transformers.AutoTokenizer.from_pretrained),
        )
    else:
        model_class = transformers.AutoModelForImageTextToText
        processor = load_part("processor", folder, transformers.AutoProcessor.from_pretrained)
    model = load_part("captioner", folder, model_class.from_pretrained, dtype=dtype)
    if not hasattr(model, "generate"):
        raise CheckpointError(f"{folder} holds a {type(model).__name__}, which generates no text.")
    return Captioner(
        model.to(device).eval(), processor, instruction=instruction, max_new_tokens=max_new_tokens
    )  # fmt: skip
