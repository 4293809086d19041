"""The judge is right on fresh renders and wrong on empty or shuffled pictures."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from sana.data.scenes import KINDS, Scene, SceneObject, draw_scene
from tools.scene_judge import SceneJudge, components, name_shape
from tools.score_scenes import judge_picture, prompts, summarise


@pytest.fixture(scope="module")
def judge():
    return SceneJudge()


def score(judge, scenes, pictures):
    return summarise(scenes, [judge_picture(judge, s, p) for s, p in zip(scenes, pictures, strict=True)])


@pytest.fixture(scope="module")
def drawn():
    scenes = prompts(20, seed=123, split="unseen")
    return scenes, [draw_scene(scene) for scene in scenes]


def test_fresh_renders_are_right(judge, drawn):
    scenes, pictures = drawn
    scores = score(judge, scenes, pictures)
    assert scores["ALL"] >= 0.98 and scores["two_and_one"] >= 0.98
    assert scores["direction"] == 1 and scores["background"] == 1


def test_slightly_blurred_renders_are_right(judge, drawn):
    scenes, pictures = drawn
    blurred = [np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1.2))) for picture in pictures]
    assert score(judge, scenes, blurred)["ALL"] >= 0.95


def test_empty_pictures_are_wrong(judge, drawn):
    scenes, pictures = drawn
    empty = [np.full_like(picture, 255) for picture in pictures]
    assert all(score(judge, scenes, empty)[kind] == 0 for kind in KINDS)


def test_shuffled_pictures_are_wrong(judge, drawn):
    scenes, pictures = drawn
    assert score(judge, scenes, pictures[50:] + pictures[:50])["ALL"] <= 0.02


def test_an_extra_object_is_wrong(judge):
    wanted = Scene("single", "an owl", "white", (SceneObject("owl", None, 3, 2, 1),))
    extra = Scene("single", "", "white", (*wanted.objects, SceneObject("ring", "red", 2, 5, 5)))
    assert judge_picture(judge, wanted, draw_scene(wanted))["correct"]
    assert not judge_picture(judge, wanted, draw_scene(extra))["correct"]


def test_the_wrong_direction_is_wrong_but_the_objects_count_for_direction(judge):
    left, right = SceneObject("cat", None, 3, 2, 0), SceneObject("bus", None, 3, 2, 5)
    scene = Scene("position", "a cat to the right of a bus", "white", (left, right), "to the right of")
    verdict = judge_picture(judge, scene, draw_scene(scene))
    assert verdict["direction"] is False and verdict["correct"] is False


def test_a_torn_emoji_is_no_emoji(judge):
    image = draw_scene(Scene("single", "", "white", (SceneObject("frog", None, 6, 1, 1),)))
    other = draw_scene(Scene("single", "", "white", (SceneObject("house building", None, 6, 1, 1),)))
    torn = np.concatenate([image[:128], other[128:]])
    assert [item.noun for item in judge.detect(torn)] == [None]


def test_components_joins_near_parts_and_drops_specks():
    mask = np.zeros((64, 64), bool)
    mask[5:25, 5:15] = mask[5:25, 18:28] = True  # 3 pixels apart: one thing
    mask[40:60, 40:60] = True
    mask[2, 60] = True
    assert sorted(int(part.sum()) for part in components(mask)) == [400, 400]


def test_a_shape_of_two_colours_is_no_shape():
    image = draw_scene(Scene("single", "", "white", (SceneObject("square", "red", 4, 2, 2),)))
    mask = (image != 255).any(-1)
    assert name_shape(image, mask) == ("square", "red")
    image[128:][mask[128:]] = (35, 80, 220)
    assert name_shape(image, mask) == (None, None)
