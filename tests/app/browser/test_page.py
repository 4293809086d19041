"""The web app as a visitor meets it, in headless Chromium: type, generate, see, change, cancel, restore."""

import numpy as np
import pytest

from sana.pipelines.images import read_recipe
from tests.app.browser.conftest import PHONE, Visitor

PROMPT = "a red heart"


def drawn(bundled, prompt=PROMPT, *, seed, steps=2, width=256, height=256):
    """Returns the pixels that the pipeline makes of the page's first settings."""
    recipe = {"guidance_scale": 5.0, "pag_guidance_scale": 2.0, "num_inference_steps": steps, "seed": seed}
    return np.asarray(bundled(prompt, height, width, output_type="pil", **recipe)[0])


def test_type_generate_see(visitor, bundled):
    assert "no safety check" in visitor.text("safety-notice")
    visitor.ask(PROMPT, seed=7, steps=3)
    shown = visitor.until_made()
    assert len(shown) == 1 and np.array_equal(shown[0], drawn(bundled, seed=7, steps=3))
    assert "7" in visitor.text("recipe") and PROMPT in visitor.text("recipe")
    assert visitor.text("error") == ""


def test_bad_input_is_one_sentence(visitor):
    visitor.ask("")
    assert visitor.until("error", "prompt").count(".") == 1
    visitor.type("width", 100)
    visitor.ask(PROMPT)
    assert "96 and 128" in visitor.until("error", "width")
    visitor.type("width", 128)
    visitor.ask("two nudes")
    assert "list" in visitor.until("error", "no picture was made")
    assert visitor.pictures() == [] and visitor.find("download").is_disabled()
    visitor.ask(PROMPT, seed=1)
    assert visitor.until_made()[0].shape == (256, 128, 3) and visitor.text("error") == ""


def test_the_size_is_the_pictures(visitor, bundled):
    visitor.choose("aspect", "16:9")
    visitor.until_value("height", "192")
    width, height = (int(visitor.value(name)) for name in ("width", "height"))
    assert width > height
    visitor.ask(PROMPT, seed=3)
    assert np.array_equal(visitor.until_made()[0], drawn(bundled, seed=3, width=width, height=height))
    visitor.type("width", 96)
    visitor.type("height", 160)
    visitor.ask(PROMPT, seed=4)
    assert np.array_equal(visitor.until_made()[0], drawn(bundled, seed=4, width=96, height=160))


@pytest.mark.slow
def test_cancel_ends_a_long_run_and_the_next_one_works(visitor, bundled):
    visitor.ask(PROMPT, steps=100, number=8)
    visitor.until("status", "tep 2")
    assert visitor.find("generate").is_disabled()
    visitor.press("cancel")
    visitor.until("status", "Cancelled")
    kept = visitor.pictures()
    assert len(kept) < 8 and visitor.text("error") == ""
    visitor.ask(PROMPT, seed=5)
    assert np.array_equal(visitor.until_made()[0], drawn(bundled, seed=5))


@pytest.mark.slow
def test_several_pictures_each_with_its_recipe(visitor, bundled):
    visitor.ask(PROMPT, seed=10, number=3)
    shown = visitor.until_made(3)
    assert len(shown) == 3
    for index, pixels in enumerate(shown):
        assert np.array_equal(pixels, drawn(bundled, seed=10 + index))
    visitor.find("gallery").locator("img").nth(2).click()
    visitor.until("recipe", "12")


@pytest.mark.slow
def test_a_download_holds_the_recipe_and_restores_it(visitor, bundled, tmp_path):
    visitor.choose("aspect", "3:4")
    visitor.ask("a yellow star", seed=21, steps=3)
    first = visitor.until_made()[0]
    with visitor.page.expect_download() as arriving:
        visitor.press("download")
    file = tmp_path / arriving.value.suggested_filename
    arriving.value.save_as(file)
    recipe = read_recipe(file)
    height, width = first.shape[:2]
    assert file.suffix == ".png" and (recipe["prompt"], recipe["seed"]) == ("a yellow star", 21)
    assert (recipe["width"], recipe["height"], recipe["num_inference_steps"]) == (width, height, 3)
    assert str(tmp_path.parents[1]) not in str(recipe)

    visitor.page.reload()
    visitor.unfold()
    assert visitor.value("prompt") == ""
    visitor.drop("restore", file.read_bytes(), file.name)
    visitor.until_value("prompt", "a yellow star")
    restored = [visitor.value(name) for name in ("seed", "steps", "width", "height")]
    assert restored == ["21", "3", str(width), str(height)]
    assert not visitor.find("randomise").locator("input").is_checked()
    visitor.generate()
    assert np.array_equal(visitor.until_made()[0], first)

    visitor.drop("restore", b"not a picture at all", "other.png")
    assert visitor.until("error", "PNG").count(".") >= 1


@pytest.mark.slow
def test_the_history_is_this_browsers(visitor, browser, site):
    for prompt in ("a blue square", "a green circle"):
        visitor.ask(prompt)
        visitor.until_made()
    visitor.page.reload()
    visitor.until("history", "a blue square")
    assert visitor.text("history").index("a green circle") < visitor.text("history").index("a blue square")
    visitor.choose("history", "a blue square")
    visitor.until_value("prompt", "a blue square")
    other = Visitor(browser, site.url)
    other.find("generate")
    assert not other.page.locator("#history").is_visible() and "a blue square" not in other.page.content()
    other.close()


@pytest.mark.slow
def test_two_visitors_wait_for_each_other_and_see_only_their_own(visitor, browser, site, bundled):
    visitor.ask("a long wait", steps=100, number=8)
    visitor.until("status", "tep 2")
    other = Visitor(browser, site.url)
    other.ask(PROMPT, seed=9)
    other.until("status", "in the queue")
    visitor.press("cancel")
    visitor.until("status", "Cancelled")
    assert np.array_equal(other.until_made()[0], drawn(bundled, seed=9))
    assert "a long wait" not in other.page.content() and PROMPT not in visitor.text("recipe")
    assert other.complaints == []
    other.close()


@pytest.mark.slow
def test_on_a_phone_nothing_scrolls_sideways(browser, site):
    phone = Visitor(browser, site.url, PHONE)
    phone.find("generate")
    assert phone.overflow() <= 0
    phone.ask("a" * 300, number=3)
    assert phone.overflow() <= 0
    phone.until_made(3)
    phone.ask("")
    phone.until("error", "prompt")
    assert phone.overflow() <= 0
    for name in ("prompt", "style", "aspect", "width", "steps", "generate", "gallery", "recipe", "safety-notice"):
        box = phone.find(name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"], name
    assert phone.complaints == []
    phone.close()
