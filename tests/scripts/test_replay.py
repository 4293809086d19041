"""scripts/replay.py: exit codes and what it prints."""

import json
from pathlib import Path

import pytest
from PIL import Image

from scripts import inference, replay


@pytest.fixture
def picture(model_folder: Path, tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    arguments = [f"--model_path={model_folder}", f"--txt_file={tmp_path / 'prompts.txt'}", f"--work_dir={tmp_path}/out"]
    assert inference.main([*arguments, "--step=2", "--device=cpu"]) == 0
    return next((tmp_path / "out").glob("a cat*.png"))


def test_the_same_picture_is_exit_code_0(picture, tmp_path, capsys):
    target = tmp_path / "again.png"
    assert replay.main([str(picture), f"--output={target}", "--device=cpu"]) == 0
    assert "the same picture, every pixel" in capsys.readouterr().out and target.is_file()


def test_a_changed_picture_is_exit_code_1(picture, capsys):
    from sana.pipelines.images import read_recipe, save_png

    recipe = read_recipe(picture)
    with Image.open(picture) as image:
        changed = image.convert("RGB")
    changed.putpixel((3, 4), tuple((value + 100) % 256 for value in changed.getpixel((3, 4))))
    save_png(changed, picture, recipe)
    assert replay.main([str(picture), "--device=cpu"]) == 1
    assert "1 pixels differ" in capsys.readouterr().out


def test_json_is_the_whole_report(picture, tmp_path, capsys):
    target = tmp_path / "again.png"
    capsys.readouterr()
    assert replay.main([str(picture), f"--output={target}", "--device=cpu", "--json"]) == 0
    same = {"identical": True, "pixels_differ": 0, "greatest": 0, "differences": []}
    assert json.loads(capsys.readouterr().out) == {"output": str(target), **same}


def test_what_is_no_picture_of_ours_is_exit_code_2(tmp_path, capsys):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    assert replay.main([str(tmp_path / "x.png")]) == 2
    assert "holds no recipe" in capsys.readouterr().err
    assert replay.main([str(tmp_path / "missing.png")]) == 1
    assert "missing.png" in capsys.readouterr().err
