"""Every kind of vision-language model captions images: the most probable words, alone as in a batch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sana.models.captioner.vlm import INSTRUCTION, load_captioner
from sana.models.checkpoint import CheckpointError
from tests.models.captioner.tiny import (
    WORDS,
    save_tiny_blip,
    save_tiny_clip,
    save_tiny_encoder_decoder,
    save_tiny_llava,
)


def noise_images(count: int = 4) -> list[Image.Image]:
    shapes = [(40, 50, 3), (64, 20, 3)]
    return [
        Image.fromarray(np.random.default_rng(n).integers(n * 60, 255, shapes[n % 2], dtype=np.uint8))
        for n in range(count)
    ]


@pytest.mark.parametrize("save", [save_tiny_blip, save_tiny_llava, save_tiny_encoder_decoder])
def test_a_batch_is_captioned_as_each_image_alone(save, tmp_path: Path) -> None:
    captioner = load_captioner(save(tmp_path), max_new_tokens=6)
    together = captioner.caption(noise_images())
    assert together == [captioner.caption([image])[0] for image in noise_images()]
    assert len(set(together)) > 1  # the image matters
    for text in together:
        assert set(text.split()) <= set(WORDS)
        assert 0 < len(text.split()) <= 6


def test_a_chat_model_answers_with_its_most_probable_words(tmp_path: Path) -> None:
    """Against one forward pass a word, written out."""
    captioner = load_captioner(save_tiny_llava(tmp_path), instruction="what ?", max_new_tokens=5)
    assert captioner.is_chat
    for image in noise_images(2):
        inputs = captioner.processor(images=image, text="<image> what ?", return_tensors="pt")
        tokens = inputs["input_ids"]
        assert tokens.shape[1] == 4 + 2  # four patches and the question
        words, memory, seen = [], None, {"pixel_values": inputs["pixel_values"]}
        for _ in range(5):
            with torch.no_grad():
                output = captioner.model(input_ids=tokens, past_key_values=memory, use_cache=True, **seen)
            tokens, memory, seen = output.logits[:, -1:].argmax(-1), output.past_key_values, {}
            if tokens.item() == 2:
                break
            words += [WORDS[tokens.item()]] if tokens.item() > 4 else []
        assert captioner.caption([image]) == [" ".join(words)]


def test_instructions(tmp_path: Path) -> None:
    chat = load_captioner(save_tiny_llava(tmp_path / "chat"))
    assert chat.instruction == INSTRUCTION
    blip = load_captioner(save_tiny_blip(tmp_path / "blip"), instruction="a red", max_new_tokens=4)
    assert all(text.startswith("a red") for text in blip.caption(noise_images()))
    assert load_captioner(tmp_path / "blip").instruction == ""
    other = load_captioner(save_tiny_encoder_decoder(tmp_path / "vit"), instruction="a red")
    with pytest.raises(ValueError, match="takes no instruction"):
        other.caption(noise_images())


def test_what_is_no_captioner_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"captioner in .* cannot be loaded"):
        load_captioner(save_tiny_clip(tmp_path / "clip"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="it has no config.json"):
        load_captioner(tmp_path / "empty")
