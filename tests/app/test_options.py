"""What the web app may be told at its start: defaults of the released app, and one sentence for what cannot be."""

import dataclasses

import pytest

from app.options import SAFETY, DemoOptions


def test_the_defaults_are_the_released_apps():
    options = DemoOptions()
    assert (options.cfg_scale, options.pag_scale, options.step) == (5.0, 2.0, -1)
    assert (options.safety, options.shield_model_path) == ("shield", "google/shieldgemma-2b")
    assert not options.safety_required


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"image_size": 0}, "image_size"),
        ({"image_size": 20_000}, "image_size .* 16384"),
        ({"cfg_scale": 0.5}, "cfg_scale .* from 1"),
        ({"cfg_scale": float("nan")}, "cfg_scale"),
        ({"pag_scale": 101.0}, "pag_scale"),
        ({"step": 0}, "step"),
        ({"step": 3.5}, "step"),
        ({"seed": -1}, "seed"),
        ({"seed": True}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"bs": 0}, "bs"),
        ({"max_queue": 0}, "max_queue"),
        ({"max_images": 1001}, "max_images"),
        ({"safety": "shiled"}, "Did you mean 'shield'"),
        ({"safety": "basic", "safety_required": True}, "safety=basic uses no model"),
    ],
)
def test_what_cannot_be_is_one_sentence(given, complaint):
    with pytest.raises(ValueError, match=complaint):
        DemoOptions(**given)


@pytest.mark.parametrize("safety", SAFETY)
def test_every_word_of_safety_is_taken(safety):
    assert DemoOptions(safety=safety).safety == safety


def test_nobody_changes_options():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DemoOptions().seed = 3  # type: ignore[misc]
