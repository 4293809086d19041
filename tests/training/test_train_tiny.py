"""`make train-tiny`: the same seed on the same machine gives the same files, bit for bit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sana.config import load_config
from sana.pipelines.sana_pipeline import SanaPipeline
from sana.training.trainer import Trainer
from tests.training.conftest import TINY_YAML

ROOT = Path(__file__).parents[2]


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_the_same_seed_gives_the_same_file(tiny_options, tmp_path):
    def trained(*more):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        Trainer(load_config(TINY_YAML, [*tiny_options, "--model.mixed_precision=bf16", *more])).train()
        return contents(tmp_path / "run/model")

    first = trained()
    assert sorted(first) == ["model.safetensors", "text_encoder/model.safetensors"]
    assert trained() == first
    assert trained("--train.seed=2")["model.safetensors"] != first["model.safetensors"]


def test_an_autoencoder_copied_beside_a_model_travels_with_it(tiny_options, vae_folder, tmp_path):
    shutil.copytree(vae_folder, tmp_path / "vae")
    options = [*tiny_options, f"--vae.vae_pretrained={tmp_path / 'vae'}", "--train.extra.max_steps=1"]
    Trainer(load_config(TINY_YAML, options)).train()
    shutil.copytree(tmp_path / "vae", tmp_path / "run/model/vae")
    shutil.rmtree(tmp_path / "vae")
    shutil.move(tmp_path / "run/model", tmp_path / "elsewhere")
    pipeline = SanaPipeline.from_pretrained(tmp_path / "elsewhere")
    assert pipeline("a red cat", height=64, width=64, num_inference_steps=1, progress_bar=False).shape == (1, 3, 64, 64)


@pytest.mark.slow
def test_make_train_tiny_twice(tmp_path):
    """A few steps of every stage, on two processes, in one place: the place is written into the files."""
    few = ["DCAE_STEPS=2", "STEPS=3", "DCAE_OPTIONS=--batch_size=2"]
    few += ["TINY_OPTIONS=--train.train_batch_size=4 --train.extra.pool_size=8 --train.extra.refresh=2"]

    def made():
        shutil.rmtree(tmp_path / "tiny", ignore_errors=True)
        arguments = ["make", "train-tiny", f"PYTHON={sys.executable}", "WORKERS=2", f"TINY={tmp_path / 'tiny'}", *few]
        done = subprocess.run(
            arguments, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=1800
        )
        assert done.returncode == 0, done.stderr
        return contents(tmp_path / "tiny/sana/model")

    first = made()
    assert sorted(first) == ["model.safetensors", "text_encoder/model.safetensors", "vae/model.safetensors"]
    assert made() == first
    shutil.rmtree(tmp_path / "tiny/dcae")  # the model stands alone
    pipeline = SanaPipeline.from_pretrained(tmp_path / "tiny/sana/model")
    assert pipeline("a red cat", height=64, width=64, num_inference_steps=1, progress_bar=False).shape == (1, 3, 64, 64)
