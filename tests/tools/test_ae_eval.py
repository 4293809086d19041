"""The command that measures autoencoders: its numbers are the metrics', and what is not computed is said so."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from sana.models.autoencoder.dc_ae import DCAE, DCAEConfig
from sana.models.autoencoder.loading import load_autoencoder, save_autoencoder
from sana.training.ae_metrics import structural_similarity
from sana.training.dcae_trainer import crops, psnr
from tests.training.conftest import SHAPE
from tools import ae_eval
from tools.ae_eval import NOT_COMPUTED, main, scene_batches


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    save_autoencoder(DCAE(DCAEConfig(**SHAPE)), folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (5, 40, 64, 3), np.uint8)):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
    return tmp_path / "images"


def run(*arguments):
    return main([str(one) for one in arguments])


def test_scores_of_drawn_scenes(vae, tmp_path, capsys):
    assert (
        run("--vae", vae, "--scenes", 8, "--batch_size", 3, "--json", tmp_path / "s.json", "--csv", tmp_path / "s.csv")
        == 0
    )
    scores = json.loads((tmp_path / "s.json").read_text())
    autoencoder, images = load_autoencoder(vae), crops(10**6, 8, whole=True)
    assert scores["psnr"] == pytest.approx(psnr(autoencoder, count=8), abs=1e-3)
    with torch.no_grad():
        expected = structural_similarity(images, autoencoder.decode(autoencoder.encode(images)).clamp(-1, 1))
    rows = list(csv.DictReader((tmp_path / "s.csv").open()))
    assert [float(row["ssim"]) for row in rows] == pytest.approx(expected.tolist(), abs=1e-5)
    assert scores["ssim"] == pytest.approx(expected.mean().item(), abs=1e-5)
    assert scores["images"] == 8 and scores["rfid"] == NOT_COMPUTED
    assert NOT_COMPUTED in capsys.readouterr().out


def test_scenes_do_not_depend_on_the_batch_size():
    batches = list(scene_batches(11, 5, 4))
    assert [len(images) for _, images in batches] == [4, 4, 3]
    assert torch.equal(
        torch.cat([images for _, images in batches]), torch.cat([i for _, i in scene_batches(11, 5, 11)])
    )


def test_a_folder_with_a_broken_image(vae, folder, tmp_path, capsys):
    (folder / "5_broken.png").write_bytes(b"x")
    arguments = (
        "--vae",
        vae,
        "--data_dir",
        folder,
        "--image_size",
        32,
        "--batch_size",
        2,
        "--json",
        tmp_path / "s.json",
    )
    assert run(*arguments) == 0
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["images"] == 5 and scores["left_out"] == ["5_broken.png"]
    assert "5_broken.png" in capsys.readouterr().err
    assert run(*arguments, "--limit", 3) == 0
    assert json.loads((tmp_path / "s.json").read_text())["images"] == 3


def test_rfid_uses_the_given_extractor(vae, folder, tmp_path, monkeypatch, capsys):
    class Means(torch.nn.Module):
        kind = "channel means"

        def __init__(self, path):
            super().__init__()
            assert path.name == "weights.pth"

        def forward(self, images):
            return images.mean((2, 3))

    monkeypatch.setattr(ae_eval, "InceptionFeatures", Means)
    result = tmp_path / "s.json"
    arguments = (
        "--vae",
        vae,
        "--data_dir",
        folder,
        "--image_size",
        32,
        "--fid_weights",
        "weights.pth",
        "--json",
        result,
    )
    assert run(*arguments) == 0
    scores = json.loads(result.read_text())
    assert scores["rfid"] > 0 and scores["rfid_features"] == "channel means"
    assert "biased" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["--data_dir", "nowhere"], 1, "nowhere"),
        (["--scenes", "2", "--fid_weights", "nowhere.pth"], 1, "nowhere.pth"),
        (["--data_dir", "IMAGES", "--image_size", "40"], 2, "multiple of 32"),
        (["--scenes", "2", "--dtype", "fp13"], 2, "fp13"),
    ],
)
def test_exit_codes(vae, folder, capsys, arguments, code, complaint):
    assert run("--vae", vae, *[folder if one == "IMAGES" else one for one in arguments]) == code
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--scenes", "0"], ["--scenes", "2", "--data_dir", "x"]])
def test_wrong_arguments(vae, arguments):
    with pytest.raises(SystemExit) as caught:
        run("--vae", vae, *arguments)
    assert caught.value.code == 2


def test_a_bundled_model_by_its_name(monkeypatch, vae):
    loaded = []
    monkeypatch.setattr(ae_eval, "load_autoencoder", lambda ref, **_: loaded.append(ref) or load_autoencoder(vae))
    assert run("--vae", "sana_tiny", "--scenes", 1) == 0
    assert loaded == [ae_eval.MODELS / "sana_tiny/vae"]
