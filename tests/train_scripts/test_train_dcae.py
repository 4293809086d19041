"""The command of autoencoder training: the bundled recipe is its default, and every way it ends has its exit code."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from sana.models.autoencoder.dc_ae import DCAE, DCAEConfig
from sana.models.autoencoder.loading import load_autoencoder, parse_config, save_autoencoder
from sana.training.dcae_losses import LOSSES, LossWeights
from sana.training.dcae_trainer import DCAETrainer, crops
from tests.training.conftest import SHAPE
from train_scripts.train_dcae import BUNDLED, build_parser, main, read_options


@pytest.fixture
def start(tmp_path):
    torch.manual_seed(0)
    save_autoencoder(DCAE(DCAEConfig(**SHAPE)), tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
    return tmp_path / "images"


def options(*arguments):
    return read_options(vars(build_parser().parse_args([str(one) for one in arguments])))


def test_without_arguments_it_is_the_recipe_of_the_bundled_autoencoder():
    given = options()
    assert (given.lr, given.batch_size, given.steps, given.seed) == (6e-4, 16, 6000, 0)
    assert (given.latent_noise, given.whole_scene_from, given.optimizer, given.mixed_precision) == (
        0.15,
        0.85,
        "muon",
        "bf16",
    )
    assert given.weights == LOSSES["scenes"] and not given.data_dir
    bundled = parse_config(json.loads((BUNDLED / "config.json").read_text()))
    assert DCAEConfig(**given.model, scaling_factor=bundled.scaling_factor) == bundled


def test_folders_and_given_weights_change_the_defaults(folder):
    tuned = options("--vae_pretrained", BUNDLED, "--freeze_encoder", "--data_dir", folder, "--gan", 0.5)
    assert tuned.weights == LossWeights(l1=1.0, lpips=0.1, gan=0.5)
    assert (tuned.lr, tuned.lpips_weights, tuned.latent_noise) == (1e-4, None, 0.05)
    fresh = options("--data_dir", folder, "--preset", "dc-ae-f32c32-sana-1.1", "--l1", 2)
    assert fresh.weights == LossWeights(l1=2.0, lpips=0.1) and fresh.lpips_weights == BUNDLED
    assert fresh.model["encoder_depth_list"] == (2, 2, 2, 3, 3, 3)
    assert options("--init", BUNDLED, "--decoder_only").freeze_encoder  # the former names


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--preset", "dc-ae-f31"], "dc-ae-f32c32-sana-1.1"),
        (["--preset", "dc-ae-f32c32-in-1.0", "--vae_pretrained", BUNDLED], "--preset"),
        (["--freeze_encoder"], "vae_pretrained"),
        (["--gan", "-1"], "gan"),
        (["--save_dtype", "int4"], "int4"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(tmp_path, capsys, arguments, complaint):
    assert main(["--work_dir", str(tmp_path / "run"), *map(str, arguments)]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [(["--vae_pretrained", "nowhere"], "nowhere"), (["--vae_pretrained", BUNDLED, "--data_dir", "nowhere"], "nowhere")],
)
def test_what_is_not_there_is_exit_code_1(tmp_path, capsys, arguments, complaint):
    assert main(["--work_dir", str(tmp_path / "run"), *map(str, arguments)]) == 1
    assert complaint in capsys.readouterr().err


def test_a_run_that_is_stopped_twice_ends_with_the_same_latents(tmp_path, start, folder, capsys, monkeypatch):
    arguments = [
        "--work_dir", tmp_path / "run", "--vae_pretrained", start, "--freeze_encoder", "--data_dir", folder,
        "--image_size", 64, "--steps", 4, "--batch_size", 2, "--log_every", 1,
    ]  # fmt: skip
    arguments = [str(one) for one in arguments]
    step = DCAETrainer.train_step

    def killed_by(signum):
        def killed(trainer, images, fraction):
            os.kill(os.getpid(), signum)
            return step(trainer, images, fraction)

        return killed

    for signum, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with monkeypatch.context() as patched:
            patched.setattr(DCAETrainer, "train_step", killed_by(signum))
            assert main(arguments) == code
        assert not (tmp_path / "run/vae").exists()
    assert main([*arguments, "--save_dtype", "bf16"]) == 2  # would round the frozen encoder
    assert "frozen encoder" in capsys.readouterr().err
    assert main(arguments) == 0
    assert "3 training images" in capsys.readouterr().out
    lines = (tmp_path / "run/train_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    before, after = load_autoencoder(start), load_autoencoder(tmp_path / "run/vae")
    images = crops(0, 2, whole=False)
    with torch.no_grad():
        assert torch.equal(before.encode(images), after.encode(images))
        assert not torch.equal(before.decode(before.encode(images)), after.decode(before.encode(images)))


def test_a_fresh_latent_space_is_scaled_to_unit_variance(tmp_path, start, folder):
    arguments = ["--vae_pretrained", start, "--data_dir", folder, "--image_size", 64, "--steps", 2, "--batch_size", 2]
    assert main(["--work_dir", str(tmp_path / "run"), *map(str, arguments)]) == 0
    tuned = load_autoencoder(tmp_path / "run/vae")
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        assert tuned.encode(images).std().item() == pytest.approx(1, rel=1e-3)
