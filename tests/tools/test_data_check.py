"""The checking tool: table, JSON and exit codes."""

import json
from pathlib import Path

import pytest
import yaml

from tests.data.test_check import good_files, write, write_tar
from tools.data_check import main

CONFIG = "configs/sana_config/tiny/Sana_tiny_img256.yaml"


def test_a_clean_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path / "images", good_files())
    report = tmp_path / "out" / "report.json"
    assert main([str(tmp_path / "images"), "--json", str(report)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("3 images, 3 captions")
    assert shown.endswith("clean\n")
    content = json.loads(report.read_text())
    assert content["clean"] is True
    assert content["sizes"]["smaller_than_wanted"] == 3


def test_problems_are_shown_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path / "images", good_files(8) | {f"{n:04d}.txt": b" " for n in range(7)})
    report = tmp_path / "report.json"
    assert main([str(tmp_path / "images"), "--json", str(report)]) == 1
    shown = capsys.readouterr().out
    assert "7  images without a caption" in shown
    assert "... and 2 more" in shown
    assert shown.endswith("not clean\n")
    assert len(json.loads(report.read_text())["problems"]["no_caption"]) == 7


def test_shards_by_type(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_tar(tmp_path / "00000.tar", good_files())
    assert main([str(tmp_path), "--type", "SanaWebDatasetMS", "--image_size", "64"]) == 0
    assert main([str(tmp_path), "--type", "SanaImgDataset"]) == 1  # there are no images outside the shard
    assert "0 images" in capsys.readouterr().out


def test_the_configuration_says_what_training_wants(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    raw = yaml.safe_load(Path(CONFIG).read_text())
    raw["data"] |= {"data_dir": [str(tmp_path / "images")]}
    raw["model"]["multi_scale"] = True
    raw["train"]["train_batch_size"] = 4
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    write(tmp_path / "images", good_files(3) | {"0001.txt": b"cat " * 80})
    assert main(["--config", str(tmp_path / "config.yaml")]) == 1
    shown = capsys.readouterr().out
    assert "1.0: 3 images, and a batch has 4" in shown
    assert "0001.png: prompt: its last " in shown
    assert "tokens are cut (text_encoder.model_max_length is 64)" in shown
    words = ["--max_words", "80", "--batch_size", "3"]  # the command line goes before
    assert main(["--config", str(tmp_path / "config.yaml"), *words]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "name the folders to check"),
        (["nowhere"], 1, "nowhere does not exist"),
        (["asset", "--type", "Folder"], 2, "--type"),
        (["asset", "--threads", "0"], 2, "--threads must be at least 1"),
        (["asset", "--tokenizer", "nowhere"], 2, "--tokenizer nowhere is no tokenizer.json"),
        (["asset", "--config", "nowhere.yaml"], 2, "nowhere.yaml"),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture, arguments: list[str], code: int, message: str) -> None:
    try:
        found = main(arguments)
    except SystemExit as stopped:
        found = stopped.code
    assert found == code
    assert message in capsys.readouterr().err
