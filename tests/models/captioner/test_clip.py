"""CLIP scores against the formula, from the towers' own outputs."""

import math
from pathlib import Path

import pytest
import torch

from sana.models.captioner.clip import load_clip
from sana.models.checkpoint import CheckpointError
from tests.models.captioner.test_vlm import noise_images
from tests.models.captioner.tiny import save_tiny_clip

CAPTIONS = [["a red cat", "two owls on blue"], [], ["what ?"], ["owls", "a", "blue cat"]]


def formula(scorer, image, caption: str) -> float:
    """100 * cos of the projected towers, in plain numbers."""
    inputs = scorer.processor(images=image, text=caption, return_tensors="pt")
    with torch.no_grad():
        seen = scorer.model.vision_model(pixel_values=inputs["pixel_values"]).pooler_output
        said = scorer.model.text_model(input_ids=inputs["input_ids"]).pooler_output
        seen = scorer.model.visual_projection(seen)[0].double().tolist()
        said = scorer.model.text_projection(said)[0].double().tolist()
    dot = sum(a * b for a, b in zip(seen, said, strict=True))
    return 100 * dot / math.sqrt(sum(a * a for a in seen) * sum(b * b for b in said))


def test_scores_equal_the_formula(tmp_path: Path) -> None:
    scorer = load_clip(save_tiny_clip(tmp_path))
    found = scorer.score(noise_images(), CAPTIONS)
    expected = [
        [formula(scorer, image, caption) for caption in captions]
        for image, captions in zip(noise_images(), CAPTIONS, strict=True)
    ]
    flat = [value for row in expected for value in row]
    assert min(flat) < 0 < max(flat)  # both sides of the cut are there
    assert [len(row) for row in found] == [2, 0, 1, 3]
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx([max(value, 0.0) for value in wanted], abs=1e-3)


def test_a_long_caption_counts_with_its_start(tmp_path: Path) -> None:
    scorer = load_clip(save_tiny_clip(tmp_path))
    start, images = "cat owls " * 5, noise_images(4)  # ten words and two ends fill the twelve positions
    long = scorer.score(images, [[start + "red blue"]] * 4)
    assert long == scorer.score(images, [[start]] * 4)
    assert scorer.score(images, [[]] * 4) == [[], [], [], []]


def test_what_is_no_clip_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="holds a bert model; CLIP has an image and a text tower"):
        load_clip(tmp_path)
    broken = save_tiny_clip(tmp_path / "clip")
    (broken / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"CLIP model in .*clip cannot be loaded"):
        load_clip(broken)
