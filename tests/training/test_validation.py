"""Validation draws what the pipeline draws, the same every time, and leaves the training as it was."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image

from sana.pipelines.images import contact_sheet, read_recipe, to_pil
from sana.pipelines.sana_pipeline import SanaPipeline
from sana.training.validation import Validator, live_pipeline
from tests.tiny_model import IMAGE_SIZE, make_model_folder

PROMPTS = ["a red cat", "portrait of an old fisherman by the sea", "雪山日出"]
SIZE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return SanaPipeline.from_pretrained(make_model_folder(tmp_path_factory.mktemp("model") / "tiny"), device="cpu")


@pytest.fixture
def pipeline(loaded):
    """Live networks of a training run: the transformer may be changed by a test."""
    transformer = copy.deepcopy(loaded.transformer).train().requires_grad_(True)
    return live_pipeline(
        loaded.config, transformer=transformer, autoencoder=loaded.autoencoder, text_encoder=loaded.text_encoder
    )


def validator(pipeline, folder, **changed):
    options = {"every": 5, **SIZE, "seed": 11, "num_inference_steps": 2, "batch_size": 2} | changed
    return Validator(pipeline, PROMPTS, folder, **options)


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("guidance_scale", [4.5, 1.0])
def test_the_sheet_shows_what_the_pipeline_draws(loaded, pipeline, tmp_path, guidance_scale):
    path = validator(pipeline, tmp_path / "validation", guidance_scale=guidance_scale).run(400)
    learning = copy.copy(loaded)  # weights that learn are multiplied by other routines than frozen ones
    learning.transformer = copy.deepcopy(loaded.transformer).requires_grad_(True)
    images = learning(
        PROMPTS, **SIZE, seed=[11, 12, 13], num_inference_steps=2, guidance_scale=guidance_scale, progress_bar=False
    )
    assert path == tmp_path / "validation" / "step_00000400.png"
    assert (pixels(path) == np.asarray(contact_sheet(to_pil(images), PROMPTS, cell=192))).all()
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert (read_recipe(path)["step"], read_recipe(path)["seeds"]) == (400, [11, 12, 13])


def test_noise_is_the_same_at_every_step_unless_asked_otherwise(pipeline, tmp_path):
    fixed = validator(pipeline, tmp_path / "fixed")
    assert (pixels(fixed.run(5)) == pixels(fixed.run(10))).all()
    varied = validator(pipeline, tmp_path / "varied", deterministic=False)
    first, second = pixels(varied.run(5)), pixels(varied.run(10))
    assert (first != second).any()
    assert (pixels(varied.run(5)) == first).all()  # a resumed run draws it again


def test_training_is_left_as_it_was(pipeline, tmp_path):
    transformer = pipeline.transformer
    transformer.blocks[0].eval()
    transformer.blocks[0].requires_grad_(False)
    transformer.x_embedder.proj.weight.grad = torch.ones_like(transformer.x_embedder.proj.weight)
    modes = [module.training for module in transformer.modules()]
    learns = [parameter.requires_grad for parameter in transformer.parameters()]
    weights = copy.deepcopy(transformer.state_dict())
    seen = []

    def watch(module, inputs):  # in inference mode a sharded model would keep tensors that it cannot train with
        seen.append(module.training or torch.is_inference_mode_enabled() or torch.is_grad_enabled())
        torch.rand(1), random.random(), np.random.rand()

    transformer.register_forward_pre_hook(watch)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    validator(pipeline, tmp_path).run(5)
    assert seen
    assert not any(seen)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert [module.training for module in transformer.modules()] == modes
    assert [parameter.requires_grad for parameter in transformer.parameters()] == learns
    assert [p.grad is None for p in transformer.parameters()].count(False) == 1
    for key, value in transformer.state_dict().items():
        assert torch.equal(value, weights[key]), key


def test_a_training_step_under_one_autocast_with_a_validation_is_as_without(pipeline, tmp_path):
    transformer = pipeline.transformer
    embeds = pipeline.encode_prompts(["x"])
    embeds, mask = embeds.embeds[:, None].clone(), embeds.mask.clone()
    latents = torch.randn(1, pipeline.autoencoder.latent_channels, 2, 2)

    def gradients(*, validate):
        transformer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            if validate:
                with torch.no_grad():
                    own = [parameter.clone() for parameter in transformer.parameters()]
                    for parameter in transformer.parameters():
                        parameter.mul_(1.5)  # as averaged weights that are put in for the validation
                    validator(pipeline, tmp_path, autocast=torch.bfloat16).run(5)
                    for parameter, value in zip(transformer.parameters(), own, strict=True):
                        parameter.copy_(value)
            transformer(latents, torch.tensor([500.0]), embeds, mask=mask).float().square().sum().backward()
        return {name: parameter.grad for name, parameter in transformer.named_parameters()}

    without, with_validation = gradients(validate=False), gradients(validate=True)
    assert sum(grad is not None for grad in without.values()) > 20
    for name, grad in without.items():
        assert (grad is None) == (with_validation[name] is None), name
        assert grad is None or torch.equal(grad, with_validation[name]), name


def test_modes_are_restored_when_a_call_fails(pipeline, tmp_path):
    def fail(*_):
        raise KeyboardInterrupt

    pipeline.transformer.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        validator(pipeline, tmp_path).run(5)
    assert pipeline.transformer.training


def test_prompts_are_encoded_once_and_the_encoder_may_go(pipeline, tmp_path):
    prepared = validator(pipeline, tmp_path)
    prepared.prepare()
    pipeline._text_encoder = None
    pipeline.config = copy.deepcopy(pipeline.config)
    pipeline.config.text_encoder.text_encoder_name = "nowhere/at-all"
    assert prepared.run(5).is_file()


def test_a_text_encoder_that_learns_is_asked_every_time(pipeline, tmp_path, monkeypatch):
    calls = []
    encode = pipeline.encode_prompts
    monkeypatch.setattr(pipeline, "encode_prompts", lambda *a, **k: calls.append(a) or encode(*a, **k))
    learning = validator(pipeline, tmp_path, cache_prompts=False)
    learning.prepare()
    learning.run(5)
    learning.run(10)
    assert len(calls) == 4  # prompts and null caption, twice


def test_pictures_that_are_not_finite_are_marked_and_logged(pipeline, tmp_path, caplog):
    good = pixels(validator(pipeline, tmp_path / "good").run(5))
    spoilt = validator(pipeline, tmp_path / "bad")
    spoilt.prepare()
    spoilt._embeds[0].embeds[1].fill_(math.nan)
    bad = pixels(spoilt.run(5))
    assert caplog.text.count("not finite") == 1
    assert repr(PROMPTS[1]) in caplog.text
    differs = (good != bad).any(axis=(0, 2))  # by column: pictures stand side by side, two in the upper row
    assert not differs[:200].any()
    assert differs[208:].any()


def test_a_broken_model_does_not_stop_the_run(pipeline, tmp_path):
    with torch.no_grad():
        pipeline.transformer.x_embedder.proj.weight.fill_(math.nan)
    assert validator(pipeline, tmp_path).run(5).is_file()


def test_a_disk_that_takes_nothing_does_not_stop_the_run(pipeline, tmp_path, caplog):
    (tmp_path / "validation").write_text("a file where a folder is needed")
    assert validator(pipeline, tmp_path / "validation").run(5) is None
    assert "could not be written" in caplog.text


def test_only_the_main_process_writes(pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert validator(pipeline, tmp_path).run(5) is None
    assert list(tmp_path.iterdir()) == []


def test_when_it_is_due(pipeline, tmp_path):
    assert [step for step in range(12) if validator(pipeline, tmp_path).due(step)] == [5, 10]
    assert not any(validator(pipeline, tmp_path, every=0).due(step) for step in range(12))
    with pytest.raises(ValueError, match="needs prompts"):
        Validator(pipeline, [], tmp_path, every=1, **SIZE)


def test_a_configuration_decides(pipeline, tmp_path):
    config = copy.deepcopy(pipeline.config)
    config.train.validation_prompts = PROMPTS[:1]
    config.train.eval_sampling_steps, config.train.seed = 7, 3
    config.train.extra = {"train_text_encoder": True}
    made = Validator.for_training(
        config, transformer=pipeline.transformer, autoencoder=pipeline.autoencoder,
        text_encoder=pipeline.text_encoder, folder=tmp_path,
    )  # fmt: skip
    assert (made.every, made.seeds(7), made.cache_prompts, made.autocast) == (7, [3], False, None)
    assert made.pipeline.transformer is pipeline.transformer
