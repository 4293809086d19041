"""The bundled model: small enough, stored as promised, and its pictures match their prompts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from sana import SanaPipeline
from sana.training.dcae_trainer import psnr
from tools.scene_judge import SceneJudge
from tools.score_scenes import judge_picture, prompts

MODEL = Path(__file__).parents[1] / "asset/models/sana_tiny"
FILES = sorted(MODEL.rglob("*.safetensors"))


@pytest.fixture(scope="module")
def pipeline():
    return SanaPipeline.from_pretrained(MODEL, device="cpu")


def test_weights_are_small_and_bfloat16():
    assert len(FILES) == 3
    assert sum(path.stat().st_size for path in FILES) <= 24 * 2**20
    assert max(path.stat().st_size for path in FILES) <= 16 * 2**20
    for path in FILES:
        with safe_open(path, "pt") as opened:
            assert {opened.get_slice(name).get_dtype() for name in opened.keys()} == {"BF16"}  # noqa: SIM118


def test_the_autoencoder_reaches_its_floor(pipeline):
    assert psnr(pipeline.autoencoder, count=16) >= 31


def test_the_architecture_is_sanas(pipeline):
    arch = pipeline.transformer.architecture
    assert (arch.attn_type, arch.ffn_type, arch.use_pe, arch.patch_size) == ("linear", "glumbconv", False, 1)
    assert pipeline.autoencoder.downsample_factor == 32 and pipeline.autoencoder.latent_channels == 32
    assert pipeline.text_encoder.model.config.model_type == "gemma2"
    assert pipeline.text_encoder.chi_prompt == "Draw this picture.\n"


def test_pictures_match_their_prompts(pipeline):
    """Three prompts of each scored kind, combinations unseen in training for those that combine."""
    scenes = [scene for scene in prompts(3, seed=1, split="unseen") if scene.kind != "two_and_one"]
    images = pipeline(
        [scene.caption for scene in scenes], height=256, width=256, guidance_scale=4.5, seed=0, output_type="np"
    )
    pixels = (np.asarray(images) * 255).round().astype(np.uint8)
    judge = SceneJudge()
    verdicts = [judge_picture(judge, scene, image) for scene, image in zip(scenes, pixels, strict=True)]
    assert sum(bool(v["correct"]) for v in verdicts) >= 0.8 * len(scenes)
    assert sum(bool(v["background"]) for v in verdicts) >= 0.8 * len(scenes)


def test_the_prompt_is_what_decides(pipeline):
    with torch.no_grad():
        red, blue = pipeline(["a red circle", "a blue circle"], height=256, width=256, seed=[5, 5], output_type="pt")
    centre = slice(112, 144)
    assert red[0, centre, centre].mean() > red[2, centre, centre].mean() + 0.5
    assert blue[2, centre, centre].mean() > blue[0, centre, centre].mean() + 0.5
