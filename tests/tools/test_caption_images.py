"""The captioning tool: files in the official format, exit codes."""

import json
from pathlib import Path

import pytest

from sana.data import DATASETS
from tests.data.test_check import good_files, write
from tests.models.captioner.tiny import save_tiny_blip
from tools.caption_images import main


def test_captions_are_written_and_read_by_the_data_set(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = save_tiny_blip(tmp_path / "blip-tiny")
    images = write(tmp_path / "images", {name: data for name, data in good_files(3).items() if name.endswith("png")})
    command = ["--model_path", str(model), str(images), "--max_new_tokens", "6", "--device", "cpu", "--batch_size", "2"]
    assert main(command) == 0
    assert capsys.readouterr().out == "3 images captioned, 0 were complete, 0 cannot be read\n"
    content = json.loads((images / "0002_blip-tiny.json").read_text())
    assert list(content) == ["0002"]
    assert list(content["0002"]) == ["blip-tiny"]
    dataset = DATASETS["SanaImgDataset"](data_dir=str(images), external_caption_suffixes=["_blip-tiny"])
    assert [dataset.captions(index) for index in range(3)][2] == [content["0002"]["blip-tiny"]]
    assert main(command) == 0
    assert capsys.readouterr().out == "0 images captioned, 3 were complete, 0 cannot be read\n"
    assert main([*command, "--name", "Other", "--prompt", "two owls"]) == 0
    assert json.loads((images / "0000_Other.json").read_text())["0000"]["Other"].startswith("two owls")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["asset"], 2, "--model_path"),
        (["--model_path", "nowhere/", "asset", "--name", "a/b"], 2, "--name 'a/b'"),
        (["--model_path", "nowhere/", "asset", "--name", "a_clip_score"], 2, "--name 'a_clip_score'"),
        (["--model_path", "x", "asset", "--batch_size", "0"], 2, "--batch_size"),
        (["--model_path", "./nowhere", "asset"], 1, "nowhere"),
        (["--model_path", "asset/models", "asset"], 1, "asset/models is no model folder of transformers"),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture, arguments: list[str], code: int, message: str) -> None:
    try:
        found = main(arguments)
    except SystemExit as stopped:
        found = stopped.code
    assert found == code
    assert message in capsys.readouterr().err


def test_no_image_fails(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = save_tiny_blip(tmp_path / "blip")
    (tmp_path / "images").mkdir()
    assert main(["--model_path", str(model), str(tmp_path / "images")]) == 1
    assert "There is no image in" in capsys.readouterr().err
