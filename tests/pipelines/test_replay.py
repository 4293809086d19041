"""Replay: the same bits from a picture's own recipe, whatever it was made with, and what is said when they differ."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sana.pipelines import batch
from sana.pipelines.options import InferenceOptions
from sana.pipelines.replay import replay


@pytest.fixture
def options(model_folder: Path, tmp_path: Path) -> InferenceOptions:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog --hw 64:96\n雪山日出 🌸\n", encoding="utf-8")
    return InferenceOptions(
        model_path=str(model_folder), txt_file=str(prompts), work_dir=str(tmp_path / "out"), step=4, seed=10, bs=4,
        device="cpu",
    )  # fmt: skip


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_replay_makes_the_same_picture(options):
    (report,) = batch.run(replace(options, end_index=3))
    again = replay(report.made[2], device="cpu")
    assert again.identical and not again.differences
    assert np.array_equal(pixels(again.output), pixels(report.made[2]))
    assert again.output != report.made[2]


def test_replay_says_what_differs(options, model_folder, tmp_path):
    from tests.tiny_model import make_model_folder

    (report,) = batch.run(replace(options, end_index=1))
    other = make_model_folder(tmp_path / "other", pag_applied_layers=[0])
    again = replay(report.made[0], model_path=str(other), device="cpu")
    assert again.identical  # the changed setting acts under PAG only, but it is reported
    assert any(line.startswith("weights: ") for line in again.differences)
    assert any(line.startswith("made_with.model_path: ") for line in again.differences)


def test_replay_of_another_picture_is_usage(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="holds no recipe"):
        replay(tmp_path / "x.png")


@pytest.mark.parametrize(
    "change",
    [
        {"upscale_from": 64, "custom_image_size": 128, "upscale_strength": 0.8},
        {"upscale_from": 64, "custom_image_size": 128, "vae_tiling": 64},
        {"step_cache": 2.0, "max_text_tokens": 4},
        {"use_resolution_binning": False, "custom_image_size": 96},
        {"quantization": "nf4", "text_quantization": "int8"},
    ],
)
def test_every_setting_is_in_the_recipe(options, change):
    (plain,) = batch.run(replace(options, start_index=2))
    (report,) = batch.run(replace(options, start_index=2, **change))
    again = replay(report.made[0], device="cpu")
    assert again.identical and not again.differences
    before, after = pixels(plain.made[0]), pixels(report.made[0])
    assert before.shape != after.shape or not np.array_equal(before, after)
