"""The scoring tool: files in the official format, one for each file of captions."""

import json
from pathlib import Path

import pytest
from PIL import Image

from sana.data import DATASETS
from sana.models.captioner.clip import load_clip
from tests.data.test_check import good_files, write, write_tar
from tests.models.captioner.tiny import save_tiny_clip
from tools.clip_score import main

MORE = {
    "0001_VLM.json": b'{"0001": {"VLM": "a red cat", "short": "cat"}}',
    "0002_VLM.json": b'{"0002": {"VLM": "two owls"}}',
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_clip(tmp_path / "clip")


def test_scores_are_written_and_read_by_the_data_set(model: Path, tmp_path: Path, capsys) -> None:
    images = write(tmp_path / "images", good_files(3) | MORE)
    assert main(["--model_path", str(model), str(images), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "3 images scored, 0 were complete, 0 cannot be read\n"
    files = sorted(path.name for path in images.glob("*_clip_score.json"))
    assert files == [
        *("0000_prompt_clip_score.json", "0001_VLM_clip_score.json", "0001_prompt_clip_score.json"),
        *("0002_VLM_clip_score.json", "0002_prompt_clip_score.json"),
    ]
    content = json.loads((images / "0001_VLM_clip_score.json").read_text())
    picture = Image.open(images / "0001.png").convert("RGB")
    [[first, second]] = load_clip(model).score([picture], [["a red cat", "cat"]])
    assert content == {"0001": {"VLM": f"{first:.4f}", "short": f"{second:.4f}"}}
    dataset = DATASETS["SanaImgDataset"](
        data_dir=str(images), external_caption_suffixes=["_VLM"],
        external_clipscore_suffixes=["_VLM_clip_score", "_prompt_clip_score"],
    )  # fmt: skip
    assert dict(dataset.scored_captions(1)[1]).keys() == {"VLM", "short", "prompt"}
    assert main(["--model_path", str(model), str(images)]) == 0
    assert "0 images scored, 3 were complete" in capsys.readouterr().out


def test_chosen_captions_alone(model: Path, tmp_path: Path) -> None:
    images = write(tmp_path / "images", good_files(3) | MORE)
    assert main(["--model_path", str(model), str(images), "--captions", "VLM"]) == 0
    found = {path.name: json.loads(path.read_text()) for path in images.glob("*_clip_score.json")}
    assert set(found) == {"0001_VLM_clip_score.json", "0002_VLM_clip_score.json"}
    assert set(found["0001_VLM_clip_score.json"]["0001"]) == {"VLM"}


def test_shards_have_a_file_each(model: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "shards" / "00000.tar", good_files(3))
    (tmp_path / "shards" / "00000_VLM.json").write_text('{"0001": {"VLM": "a red cat"}}')
    assert main(["--model_path", str(model), str(tmp_path / "shards"), "--batch_size", "2"]) == 0
    scores = json.loads((tmp_path / "shards" / "00000_prompt_clip_score.json").read_text())
    assert list(scores) == ["0000", "0001", "0002"]
    assert list(json.loads((tmp_path / "shards" / "00000_VLM_clip_score.json").read_text())) == ["0001"]


def test_nothing_to_score_fails(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    images = write(tmp_path / "images", good_files(1))
    assert main(["--model_path", str(model), str(images), "--captions", "VLM"]) == 1
    assert "There is no image with such a caption in" in capsys.readouterr().err


def test_wrong_usage(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--model_path", "x", "asset", "--batch_size", "0"])
    assert stopped.value.code == 2
    assert main(["--model_path", "asset/models", "asset"]) == 1
    assert "asset/models is no model folder of transformers" in capsys.readouterr().err
