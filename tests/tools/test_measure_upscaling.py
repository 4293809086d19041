"""tools/measure_upscaling.py: what is asked of the pipeline, scores of pictures that are known to be right or wrong."""

import json

import numpy as np
import pytest
from PIL import Image

from sana.data.scenes import draw_scene
from tools import measure_upscaling
from tools.measure_upscaling import conditions, draw, main, score
from tools.scene_judge import SceneJudge
from tools.score_scenes import MEAN_OF, prompts


def drawn(scene, size):
    return Image.fromarray(draw_scene(scene)).resize((size, size), Image.Resampling.BICUBIC)


def test_each_strength_is_one_condition_beside_the_plain_picture():
    assert conditions([0.5, 0.25]) == {
        "plain": {},
        "0.5": {"upscale_strength": 0.5},
        "0.25": {"upscale_strength": 0.25},
    }


def test_what_the_pipeline_is_asked_for():
    asked = []

    def pipeline(caption, height, width, **options):
        asked.append((height, width, options))
        return [Image.new("RGB", (width, height))]

    scene = prompts(1, 0, "unseen")[0]
    draw(pipeline, scene, 512, 256, 7, {})
    draw(pipeline, scene, 512, 256, 7, {"upscale_strength": 0.4})
    common = {"seed": 7, "output_type": "pil", "progress_bar": False}
    assert asked == [
        (512, 512, {"use_resolution_binning": False} | common),
        (512, 512, {"upscale_from": 256, "upscale_strength": 0.4} | common),
    ]


def test_enlarged_drawings_are_right_and_empty_pictures_wrong():
    scenes = [scene for scene in prompts(2, 3, "unseen") if scene.kind in MEAN_OF]
    judge = SceneJudge()
    assert score(judge, scenes, [drawn(scene, 512) for scene in scenes], 256)["ALL"] == 1.0
    assert score(judge, scenes, [Image.new("RGB", (512, 512), "white")] * len(scenes), 256)["ALL"] == 0.0


def test_scores_and_sheet_of_a_run(monkeypatch, tmp_path, capsys):
    """A stand-in draws rightly where it starts from a small picture, and nothing where it does not."""

    def stand_in(pipeline, scene, size, base, seed, extra):
        return drawn(scene, size) if extra else Image.new("RGB", (size, size), "white")

    monkeypatch.setattr(measure_upscaling, "draw", stand_in)
    options = ["--n=5", "--sizes=512", "--strengths=0.5", f"--json={tmp_path / 's.json'}"]
    assert main([*options, f"--sheet={tmp_path / 's.png'}"]) == 0
    scores = json.loads((tmp_path / "s.json").read_text())["scores"]
    assert {name: row["ALL"] for name, row in scores.items()} == {"256 plain": 0.0, "512 plain": 0.0, "512 0.5": 1.0}
    assert len(capsys.readouterr().out.splitlines()) == 3
    with Image.open(tmp_path / "s.png") as sheet:
        assert len(np.unique(np.asarray(sheet.convert("RGB")).reshape(-1, 3), axis=0)) > 10


def test_a_number_of_prompts_that_is_no_multiple_of_five_is_refused():
    with pytest.raises(SystemExit) as caught:
        main(["--n=7"])
    assert caught.value.code == 2
