"""Training at one size after another: weights carry over bit for bit, the position table is made for the new size."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sana.config import load_config
from sana.models import build_transformer
from sana.training.trainer import Trainer
from tests.training.conftest import *  # noqa: F403  its fixtures
from tests.training.conftest import TINY_YAML
from tests.training.distributed_runs import ROOT, environment

OFFICIAL = [
    f"configs/sana_config/{name}.yaml"
    for name in ("512ms/Sana_1600M_img512", "1024ms/Sana_1600M_img1024", "2048ms/Sana_1600M_img2048_bf16",
                 "4096ms/Sana_1600M_img4096_bf16")
]  # fmt: skip


def interpolated(small, size, factor):
    """The same waves at positions `factor` times as dense: entry (r, c) of the result is (r, c) / factor of before.

    Args:
        small: (N, D) table with the columns' waves in its first half, sines before cosines.
        size: tokens per side of the result.
    """
    width = small.shape[1] // 4  # frequencies per axis
    side = round(len(small) ** 0.5)
    frequencies = np.arctan2(small[1, :width], small[1, width : 2 * width])  # the angle of column 1
    table = np.empty((size, size, 4 * width))
    for half, axis in ((0, 1), (2, 0)):
        angles = np.arange(size)[:, None] / factor * frequencies
        waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
        table[:, :, half * width : (half + 2) * width] = np.expand_dims(waves, 1 - axis)
    assert side > 1
    return table.reshape(size * size, 4 * width)


@pytest.fixture
def stage(image_options):
    """A trainer at a size, with a position table."""

    def build(folder, size, pe, *more):
        own = [f"--work_dir={folder}", f"--model.image_size={size}", "--model.use_pe=true"]
        return Trainer(load_config(TINY_YAML, [*image_options, *own, f"--model.pe_interpolation={pe}", *more]))

    return build


def test_weights_carry_over_and_positions_are_interpolated(stage, tmp_path):
    first = stage(tmp_path / "64", 64, 1.0)
    first.train()
    stored = load_file(tmp_path / "64/model/model.safetensors")
    second = stage(tmp_path / "128", 128, 2.0, f"--model.load_from={tmp_path}/64/model/model.safetensors")
    state = second.networks.transformer.state_dict()
    assert state.keys() == stored.keys()
    for name, value in stored.items():
        if name != "pos_embed":
            assert torch.equal(state[name], value), name
    for name, average in first.ema.average.items():
        assert torch.equal(state[name.removeprefix("transformer.")], average), name
    small, large = stored["pos_embed"][0].double().numpy(), state["pos_embed"][0].double().numpy()
    assert small.shape == (4, 32) and large.shape == (16, 32)
    np.testing.assert_allclose(large, interpolated(small, 4, 2.0), atol=1e-6)
    corners = [0, 2, 8, 10]  # every second row and column is where the small grid was
    np.testing.assert_allclose(large[corners], small, atol=1e-6)
    used = second.networks.transformer.position_embedding((4, 4))
    assert torch.equal(used, state["pos_embed"])  # what the forward adds
    second.train()
    assert second.step == second.total_steps


def test_the_official_stages_fit_one_another():
    """All weights of a stage have a place in the next; 4096 px covers the positions of 2048 px."""
    with torch.device("meta"):
        models = [build_transformer(load_config(path)) for path in OFFICIAL]
    shapes = [{k: v.shape for k, v in model.state_dict().items() if k != "pos_embed"} for model in models]
    assert shapes[0] == shapes[1] == shapes[2] == shapes[3]
    tables = [model.position_embedding((size, size)) for model, size in zip(models, (16, 32, 64, 128), strict=True)]
    assert tables[0] is None and tables[1] is None
    every_second = tables[3].view(128, 128, -1)[::2, ::2]
    torch.testing.assert_close(every_second, tables[2].view(64, 64, -1), atol=1e-5, rtol=0)


@pytest.fixture
def script(tmp_path):
    """Runs the script with a stand-in for training, which notes its arguments and writes an empty model."""
    root = tmp_path / "repository"
    (root / "train_scripts").mkdir(parents=True)
    for name in ("asset", "configs"):
        (root / name).symlink_to(ROOT / name)
    (root / "train_scripts/progressive.sh").write_text((ROOT / "train_scripts/progressive.sh").read_text())
    (root / "train_scripts/train.sh").write_text(
        'printf "%s\\n" "$*" >> calls.txt\n'
        'for a in "$@"; do case "$a" in --work_dir=*) d="${a#--work_dir=}" ;; esac; done\n'
        'case "$d" in *"${FAILS:-nothing}") exit 143 ;; esac\n'
        '[ -n "${EARLY:-}" ] || { mkdir -p "$d/model"; touch "$d/model/model.safetensors"; }\n'
    )

    def run(*arguments, **variables):
        (root / "calls.txt").unlink(missing_ok=True)
        result = subprocess.run(
            ["bash", "train_scripts/progressive.sh", *arguments], cwd=root, env={**environment(), **variables},
            capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        calls = root / "calls.txt"
        return result, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_by_default_three_sizes_of_the_tiny_model(script):
    result, calls = script("--train.seed=7")
    assert result.returncode == 0, result.stderr
    for size, factor, call in zip((64, 128, 256), (1.0, 2.0, 4.0), calls, strict=True):
        config = load_config(call.split()[0], _options(call))
        assert (config.model.image_size, config.model.pe_interpolation) == (size, factor)
        assert config.train.seed == 7 and config.model.use_pe and config.data.data_dir == ["asset/example_data"]
        before = f"output/progressive/{size // 2}/model/model.safetensors" if size > 64 else None
        assert config.model.load_from == before and config.work_dir == f"output/progressive/{size}"
    assert "the result is output/progressive/256/model" in result.stdout


def _options(call):
    """Arguments of a recorded call: a value may hold spaces."""
    return [f"--{part.strip()}" for part in call.split(" --")[1:]]


def test_a_finished_stage_is_not_repeated_and_a_stopped_one_goes_on(script):
    result, calls = script(FAILS="/128")
    assert result.returncode == 143 and len(calls) == 2
    result, calls = script()
    assert result.returncode == 0 and len(calls) == 2 and "work_dir=output/progressive/128" in calls[0]
    assert "stage 64 is done" in result.stdout
    result, calls = script()
    assert result.returncode == 0 and calls == []


def test_a_stage_that_ended_before_its_last_step_is_not_taken_for_done(script):
    result, calls = script(EARLY="1")
    assert result.returncode == 1 and len(calls) == 1 and "goes on" in result.stderr


def test_official_files_are_taken_as_they_are(script):
    result, calls = script("--np=8", "--data.data_dir=[x]", CONFIGS=" ".join(OFFICIAL), STEPS="1 2 3 4", OUT="o")
    assert result.returncode == 0, result.stderr
    assert [call.split()[0] for call in calls] == OFFICIAL
    for number, call in enumerate(calls):
        assert f"--train.extra.max_steps={number + 1} " in call and "--np=8" in call and "image_size" not in call
    assert "--model.load_from=o/Sana_1600M_img512/model/model.safetensors" in calls[1]
    assert "load_from" not in calls[0]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"STAGES": "64 128", "STEPS": "1 2 3"}, "STEPS has 3 numbers for 2 STAGES"),
        ({"STAGES": "1 2 3", "CONFIGS": "a.yaml b.yaml"}, "CONFIGS names 2 files for 3 STAGES"),
        ({"CONFIGS": "a.yaml"}, "STAGES must name the sizes"),
        ({"STAGES": "64 large"}, "large is no size"),
    ],
)
def test_wrong_usage(script, variables, message):
    result, calls = script(**variables)
    assert result.returncode == 2 and message in result.stderr
    assert all("64" in call for call in calls)


@pytest.mark.slow
def test_the_script_as_it_is(tmp_path):
    variables = {"OUT": str(tmp_path), "STAGES": "64 128", "STEPS": "2"}
    result = subprocess.run(
        ["bash", "train_scripts/progressive.sh"], cwd=ROOT, env={**environment(), **variables}, capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert Path(tmp_path / "128/model/model.safetensors").exists() and os.access(tmp_path / "128/done", os.R_OK)
