"""The training commands of the README: a few steps of each always, the whole runs and official sizes when asked for."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sana.config import ConfigError, load_config
from sana.models import build_transformer
from sana.models.autoencoder.dc_ae import DCAEConfig
from sana.models.text_encoder.tiny import random_gemma2
from sana.pipelines.sana_pipeline import SanaPipeline
from sana.training import random_encoders
from sana.training.trainer import Trainer
from tests.training.conftest import SHAPE, TINY_YAML

ROOT = Path(__file__).parents[2]
FOLDER = [
    TINY_YAML, "--data.data_dir=[asset/example_data]", "--data.type=SanaImgDataset", "--model.multi_scale=false",
    "--train.train_batch_size=4",
]  # fmt: skip
SHARDS = [
    TINY_YAML, "--data.data_dir=[asset/example_data_tar]", "--data.type=SanaWebDatasetMS", "--model.multi_scale=true",
    "--train.train_batch_size=4",
]  # fmt: skip
ONE = [
    TINY_YAML, "--data.data_dir=[output/one]", "--data.type=SanaImgDataset", "--train.train_batch_size=4",
    "--train.extra.max_steps=200",
]  # fmt: skip
YAML_512 = "configs/sana_config/512ms/Sana_600M_img512.yaml"
YAML_1024 = "configs/sana_config/1024ms/Sana_1600M_img1024.yaml"
WEIGHTS_1600M = "hf://Efficient-Large-Model/Sana_1600M_1024px/checkpoints/Sana_1600M_1024px.pth"
OFFICIAL = [
    [YAML_512, "--data.data_dir=[asset/example_data]", "--data.type=SanaImgDataset", "--model.multi_scale=false",
     "--train.train_batch_size=32"],
    [YAML_1024, "--data.data_dir=[asset/example_data]", "--data.type=SanaImgDataset",
     f"--model.load_from={WEIGHTS_1600M}", "--model.multi_scale=false", "--train.train_batch_size=8"],
    [YAML_512, "--data.data_dir=[asset/example_data_tar]", "--data.type=SanaWebDatasetMS", "--model.multi_scale=true",
     "--train.train_batch_size=32"],
]  # fmt: skip
RANDOM = ["--train.extra={random_encoders: true, max_steps: 20}", "--train.log_interval=1"]


def command(arguments, *more):
    """Runs train.sh; returns what it printed at the end, and its exit code."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # as an activated environment has it
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": path}
    done = subprocess.run(
        ["bash", "train_scripts/train.sh", *arguments, *more],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    return done.stderr, done.returncode


def losses(work_dir):
    return [json.loads(line)["loss"] for line in (work_dir / "train_log.jsonl").read_text().splitlines()]


def check_halves(work_dir):
    """The mean loss of the last fifth is below half of the first fifth's."""
    values = losses(work_dir)
    fifth = len(values) // 5
    assert fifth and sum(values[-fifth:]) < 0.5 * sum(values[:fifth]), values


def peak_signal_to_noise(image, picture):
    """In dB, of (3, H, W) in [-1, 1]."""
    return 10 * torch.log10(4 / (image.float().clamp(-1, 1) - picture).square().mean()).item()


@pytest.mark.parametrize("arguments", [FOLDER, SHARDS], ids=["folder", "shards"])
def test_a_few_steps_of_the_example_runs(arguments, tmp_path):
    _, *options = arguments
    config = load_config(TINY_YAML, [*options, "--train.extra.max_steps=3", f"--work_dir={tmp_path}"])
    trainer = Trainer(config)
    assert trainer.data.len_epoch * config.train.num_epochs == 300  # the length of the run as documented
    trainer.train()
    assert trainer.step == 3 and np.isfinite(losses(tmp_path)).all()
    assert SanaPipeline.from_pretrained(tmp_path / "model").transformer.x_embedder.proj.out_channels == 224


def test_images_of_every_bucket_reach_the_autoencoder(tiny_options, tmp_path):
    """The table of 256 pixels has sides that are no multiples of 32."""
    _, *options = SHARDS
    trainer = Trainer(load_config(TINY_YAML, [*tiny_options, *options]))
    shapes = set()
    for _ in range(14):
        batch = trainer.data.next_batch()
        latents = trainer.encode_images(batch)
        assert all(
            abs(32 * side - pixels) <= 16
            for side, pixels in zip(latents.shape[-2:], batch.images.shape[-2:], strict=True)
        )
        shapes.add(tuple(batch.images.shape[-2:]))
    assert len(shapes) > 3 and any(side % 32 for shape in shapes for side in shape)


def test_a_stream_of_shards_trains_and_resumes_exactly(tiny_options, tmp_path):
    """Through the trainer: the state of half-filled buckets is part of a checkpoint."""
    _, *options = SHARDS
    options = [*tiny_options, *options, "--data.extra.stream=true", "--train.train_batch_size=2"]

    def trainer(folder, *more):
        return Trainer(load_config(TINY_YAML, [*options, f"--work_dir={tmp_path / folder}", *more]))

    whole = trainer("whole")
    assert whole.data.len_epoch == 6
    whole.train()
    broken = trainer("broken", "--train.save_model_steps=2")
    broken.total_steps = 2
    broken.train()
    resumed = trainer("broken")
    assert resumed.step == 2 and any(resumed.data.state_dict()["waiting"].values())
    resumed.train()
    for first, second in zip(whole.objective.parameters(), resumed.objective.parameters(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--data.type=SanaImgDataset", "--data.data_dir=[asset/example_data]"], "only SanaWebDataset is streamed"),
        (["--data.extra.order=official"], "order: official needs random access"),
        (["--data.extra.stream=false", "--data.extra.stream_samples=9"], "has no effect without data.extra.stream"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(tiny_options, more, said):
    _, *options = SHARDS
    with pytest.raises(ConfigError, match=said):
        Trainer(load_config(TINY_YAML, [*tiny_options, *options, "--data.extra.stream=true", *more]))


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [FOLDER, SHARDS], ids=["folder", "shards"])
def test_the_example_runs_halve_the_loss(arguments, tmp_path):
    shown, code = command(arguments, f"--work_dir={tmp_path}")
    assert code == 0, shown
    assert "300/300" in shown
    check_halves(tmp_path)


@pytest.mark.slow
def test_one_picture_is_learnt_by_heart(tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    for suffix in ("jpg", "txt"):
        shutil.copy(ROOT / f"asset/example_data/00000001.{suffix}", folder)
    shown, code = command(ONE, f"--data.data_dir=[{folder}]", f"--work_dir={tmp_path / 'run'}")
    assert code == 0, shown
    picture = torch.from_numpy(np.array(Image.open(folder / "00000001.jpg"))).permute(2, 0, 1) / 127.5 - 1
    pipeline = SanaPipeline.from_pretrained(tmp_path / "run/model")
    caption = (folder / "00000001.txt").read_text().strip()
    (image,) = pipeline(
        caption, height=256, width=256, num_inference_steps=20, guidance_scale=1.0, seed=0, progress_bar=False
    )
    assert peak_signal_to_noise(image, picture) > 25


@pytest.mark.parametrize("arguments", OFFICIAL, ids=["512", "1024", "512 shards"])
def test_official_commands_parse_and_build(arguments):
    path, *options = arguments
    config = load_config(path, options)
    with torch.device("meta"):
        network = build_transformer(config)
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert abs(millions - (1604 if "1600M" in path else 592)) < 2


def test_official_commands_say_offline_what_could_not_be_fetched(tmp_path):
    for (path, *options), missing in zip(OFFICIAL, ("Sana_600M_512px", "Sana_1600M_1024px", "Sana_600M_512px")):
        with pytest.raises(RuntimeError, match=rf"^Could not fetch hf://Efficient-Large-Model/{missing}/[^\n]*$"):
            Trainer(load_config(path, [*options, f"--work_dir={tmp_path}"]))


def test_the_exit_code_of_a_failed_fetch(tmp_path):
    shown, code = command(OFFICIAL[1], f"--work_dir={tmp_path}")
    assert code == 1
    assert shown.splitlines()[-1].startswith(f"error: Could not fetch {WEIGHTS_1600M}: ")
    assert "Traceback" not in shown


def test_random_encoders_train_small(tmp_path, monkeypatch):
    """The official 512 px command with everything small."""
    name = "dc-ae-f32c32-sana-1.1"
    widths = (4, 4, 8, 8, 16, 32)
    shape = {"latent_channels": 32, "encoder_width_list": widths, "decoder_width_list": widths}
    small = DCAEConfig(**SHAPE | shape)
    monkeypatch.setitem(random_encoders.DCAE_PRESETS, name, small)
    text = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    monkeypatch.setattr(random_encoders, "random_gemma2", partial(random_gemma2, **text))
    path, *options = OFFICIAL[0]
    config = load_config(
        path,
        [
            *options, *RANDOM, "--model.load_from=null", "--train.extra.max_steps=2", "--model.image_size=64",
            "--model.model=SanaMS_Tiny_P1", "--model.extra={depth: 1, hidden_size: 32, num_heads: 2}",
            "--text_encoder.caption_channels=16", "--model.mixed_precision=fp32", "--train.train_batch_size=4",
            "--train.num_workers=0", "--train.visualize=false", f"--work_dir={tmp_path}",
        ],
    )  # fmt: skip
    trainer = Trainer(config)
    assert trainer.networks.text_encoder.name == "random"
    trainer.train()
    assert trainer.step == 2 and np.isfinite(losses(tmp_path)).all()


def test_random_encoders_are_no_start_from_weights(tmp_path):
    path, *options = OFFICIAL[1]
    with pytest.raises(ConfigError, match=r"random_encoders .* cannot go with model.load_from"):
        Trainer(load_config(path, [*options, *RANDOM, f"--work_dir={tmp_path}"]))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("arguments", OFFICIAL[:2], ids=["512", "1024"])
def test_official_sizes_train_20_steps(arguments, tmp_path):
    path, *options = [option for option in arguments if "load_from" not in option]
    trainer = Trainer(load_config(path, [*options, *RANDOM, "--model.load_from=null", f"--work_dir={tmp_path}"]))
    trainer.train()
    assert trainer.step == 20 and np.isfinite(losses(tmp_path)).all()
