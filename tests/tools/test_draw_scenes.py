"""The drawing tool writes what the data set holds."""

import itertools

import numpy as np
import pytest
from PIL import Image

from sana.data.scenes import draw_scene, scenes
from tools.draw_scenes import main


def test_a_folder_holds_pictures_with_their_captions(tmp_path):
    assert main(["--n", "3", "--seed", "4", "--folder", str(tmp_path / "set")]) == 0
    for index, scene in enumerate(itertools.islice(scenes(4), 3)):
        picture = np.asarray(Image.open(tmp_path / "set" / f"{index:08d}.png"))
        assert (picture == draw_scene(scene)).all()
        assert (tmp_path / "set" / f"{index:08d}.txt").read_text().strip() == scene.caption


def test_a_sheet_is_written(tmp_path):
    assert main(["--n", "4", "--output", str(tmp_path / "sheet.png")]) == 0
    assert Image.open(tmp_path / "sheet.png").width > 512


def test_nothing_to_draw_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--n", "0"])
    assert stopped.value.code == 2
    assert "--n must be at least 1" in capsys.readouterr().err
