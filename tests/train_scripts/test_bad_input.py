"""What can be wrong with data, disks, checkpoints and options: one sentence, the documented exit code, nothing lost."""

import io
import json
import logging
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib

import numpy as np
import pytest

from sana.pipelines import command
from sana.training import trainer as trainer_module
from tests.training.conftest import *  # noqa: F403  its fixtures
from tests.training.conftest import TINY_YAML
from tests.training.distributed_runs import ROOT, environment
from train_scripts.train import main


@pytest.fixture(autouse=True)
def own_logging():
    """The command sets up the program's log; other tests want theirs."""
    logger = logging.getLogger("sana")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def options(image_options):
    return [*image_options, "--train.gradient_accumulation_steps=1"]


@pytest.fixture
def pictures(image_folder, tmp_path):
    """A copy of the pictures, to be spoilt."""
    return shutil.copytree(image_folder, tmp_path / "pictures")


@pytest.fixture
def fails(capfd):
    """Runs the command and demands one sentence with some words, and an exit code."""

    def run(arguments, code, *words):
        capfd.readouterr()
        assert main([TINY_YAML, *arguments]) == code
        error = capfd.readouterr().err
        told = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(told) == 1 and error.endswith(f"{told[0]}\n") and "Traceback" not in error, error
        for word in words:
            assert str(word) in told[0], told[0]
        return error

    return run


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_shard(folder, image, *, name="0000.png", extra=()):
    """One record, and further members, in folder/00000.tar."""
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for member, data in ((name, image), ("0000.json", json.dumps({"prompt": "a red cat"}).encode()), *extra):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return folder / "00000.tar"


def png_of(width, height):
    """The beginning of a PNG that declares a size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


@pytest.mark.parametrize("kind", ["SanaImgDataset", "SanaWebDataset", "SanaWebDatasetMS"])
def test_no_data(options, fails, tmp_path, kind):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "absent"):
        fails([*options, f"--data.type={kind}", f"--data.data_dir=[{tmp_path / folder}]"], 1, tmp_path / folder)
    fails([*options, f"--data.type={kind}", "--data.data_dir=[]"], 1, "data_dir")


def test_captions_without_images(options, fails, pictures, tmp_path):
    (pictures / "picture_4.png").unlink()
    assert main([TINY_YAML, *options, f"--data.data_dir=[{pictures}]"]) == 0
    for path in pictures.glob("*.png"):
        path.unlink()
    fails([*options, f"--data.data_dir=[{pictures}]", f"--work_dir={tmp_path / 'other'}"], 1, pictures)


def test_a_corrupt_image_is_left_out_within_the_budget(options, fails, pictures, tmp_path, capfd):
    good = (pictures / "picture_4.png").read_bytes()
    (pictures / "picture_4.png").write_bytes(good[: len(good) // 2])
    run = [*options, f"--data.data_dir=[{pictures}]", "--train.extra.max_steps=5"]
    assert main([TINY_YAML, *run]) == 0
    assert "picture_4" in capfd.readouterr().err
    elsewhere = f"--work_dir={tmp_path / 'other'}"
    fails([*run, "--data.extra.broken_budget=0", elsewhere], 1, "picture_4", "data.extra.broken_budget")


def test_the_budget_ends_a_run_that_keeps_what_it_has(options, fails, pictures, tmp_path):
    run = [*options, f"--data.data_dir=[{pictures}]"]
    assert main([TINY_YAML, *run, "--train.extra.max_steps=2"]) == 0
    before = contents(tmp_path / "run")
    for path in pictures.glob("*.png"):
        path.write_bytes(path.read_bytes()[:100])
    fails([*run, "--data.extra.broken_budget=3"], 1, "broken_budget=3")
    after = contents(tmp_path / "run")
    assert {path: after[path] for path in before if path.name != "train_log.jsonl"} == {
        path: data for path, data in before.items() if path.name != "train_log.jsonl"
    }
    log = tmp_path / "run/train_log.jsonl"
    assert after[log].startswith(before[log])


@pytest.mark.parametrize("kind", ["truncated", "traversal", "absolute"])
def test_a_shard_that_is_damaged_or_wicked(options, fails, pictures, tmp_path, kind):
    image = (pictures / "picture_4.png").read_bytes()
    name = {"truncated": "0000.png", "traversal": "../../wicked.png", "absolute": "/tmp/wicked.png"}[kind]
    shard = write_shard(tmp_path / "shards", image, name=name)
    if kind == "truncated":
        shard.write_bytes(shard.read_bytes()[: 512 + len(image) // 2])
    fails([*options, "--data.type=SanaWebDataset", f"--data.data_dir=[{shard.parent}]"], 1, "00000.tar")
    assert not (tmp_path.parent / "wicked.png").exists()


def test_a_zip_bomb(options, fails, pictures):
    content, shape = io.BytesIO(), (1, 300 << 10, 256)  # 300 MB
    with (
        zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("caption_feature.npy", "w") as file,
    ):
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for _ in range(300):
            file.write(bytes(1 << 20))
    for path in pictures.glob("*.png"):
        path.with_suffix(".npz").write_bytes(content.getvalue())
    run = [*options, f"--data.data_dir=[{pictures}]", "--data.load_text_feat=true", "--data.extra.broken_budget=2"]
    error = fails(run, 1, "picture_", "broken_budget=2")
    assert "the archive unpacks to" in error  # as it declares: nothing is unpacked


def test_a_decompression_bomb(options, fails, pictures):
    (pictures / "picture_4.png").write_bytes(png_of(100_000, 100_000))
    run = [*options, f"--data.data_dir=[{pictures}]", "--data.extra.broken_budget=0"]
    fails(run, 1, "picture_4", "broken_budget=0")


def test_weights_of_another_architecture(options, fails, tmp_path):
    assert main([TINY_YAML, *options]) == 0
    before = contents(tmp_path / "run")
    deeper = "--model.extra={depth: 2, hidden_size: 32, num_heads: 2}"
    fails([*options, deeper], 1, "depth")  # goes on from the checkpoint
    weights = f"--model.load_from={tmp_path / 'run/model/model.safetensors'}"
    fails([*options, deeper, weights, f"--work_dir={tmp_path / 'other'}"], 1, "1 blocks", "model.model")
    fails([*options, f"--model.load_from={TINY_YAML}", f"--work_dir={tmp_path / 'other'}"], 1, "Sana_tiny_img256.yaml")
    assert before == contents(tmp_path / "run")


def test_a_work_dir_that_cannot_be_written(options, fails, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", tmp_path / "file/below", "/proc/nowhere"):
        fails([*options, f"--work_dir={place}"], 1, place, "work_dir")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_full_disk_loses_nothing(options, fails, tmp_path, background):
    run = [*options, f"--train.extra.async_save={background}"]
    assert main([TINY_YAML, *run, "--train.extra.max_steps=2"]) == 0
    before = contents(tmp_path / "run/checkpoints")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32 << 10, limits[1]))  # the system refuses larger files
    try:
        fails(run, 1, "step_00000004", "earlier checkpoints are untouched")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert before == contents(tmp_path / "run/checkpoints")
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/train_log.jsonl").open()]
    assert steps[:2] == [1, 2]
    assert main([TINY_YAML, *run]) == 0  # there is room again


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--train.optimizer={type: Adamm, lr: 1.0e-4}", ["Adamm", "AdamW"]),
        ("--data.type=SanaImgDatset", ["SanaImgDatset", "SanaImgDataset"]),
        ("--model.model=SanaMS_600M_P1_D82", ["SanaMS_600M_P1_D82"]),
        ("--train.extra.stepz=3", ["stepz"]),
        ("--train.train_batch_size=0", ["train.train_batch_size"]),
        ("--data.extra.remainder=drp", ["drp", "drop"]),
        ("--resume_from=nowhere", ["nowhere"]),
    ],
)
def test_what_was_asked_for_cannot_be(options, fails, override, words):
    fails([*options, override], 2, *words)


@pytest.mark.parametrize(
    "override",
    [
        "--vae.vae_pretrained=some-lab/some-autoencoder", "--text_encoder.text_encoder_name=some-lab/some-text",
        "--model.load_from=hf://some-lab/some-model/model.pth", "--model.load_from=nowhere.pth",
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_had_offline(options, fails, override):
    fails([*options, override], 1, override.rpartition("=hf://")[2].rpartition("=")[2].removesuffix("/model.pth"))


def test_an_interrupt_before_the_first_step(options, monkeypatch, capfd):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer_module, "Trainer", interrupted)
    assert main([TINY_YAML, *options]) == 130
    assert "interrupted" in capfd.readouterr().err


def test_what_nobody_foresaw_keeps_its_traceback(options, monkeypatch):
    def broken(config):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(trainer_module, "Trainer", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        main([TINY_YAML, *options])


@pytest.mark.parametrize("number", [0, 1])
def test_other_processes_wait_for_the_main_one_to_say_it(monkeypatch, capfd, number):
    events = []
    monkeypatch.setattr(command, "rank", lambda: number)
    monkeypatch.setattr(time, "sleep", lambda seconds: events.append((seconds, capfd.readouterr().err)))
    assert main(["nowhere.yaml"]) == 2
    assert events == [(command.PATIENCE_SECONDS, "")] * number
    assert "nowhere.yaml" in capfd.readouterr().err


def test_the_command_itself(options, tmp_path):
    (tmp_path / "empty").mkdir()
    run = [sys.executable, "train_scripts/train.py", TINY_YAML, *options, f"--data.data_dir=[{tmp_path / 'empty'}]"]
    result = subprocess.run(run, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ") and str(tmp_path / "empty") in result.stderr
