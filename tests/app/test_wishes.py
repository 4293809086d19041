"""Wishes: what the fields may hold, and the sentence for everything else."""

import math
from dataclasses import replace
from typing import Any

import pytest

from app.options import DemoOptions
from app.styles import load_styles
from app.wishes import DRAWN_SEEDS, MAX_PROMPT, MAX_SEED, Limits, WishError, read_wish
from sana.pipelines.sana_pipeline import SanaPipeline

FIELDS: dict[str, Any] = {
    "prompt": "a red circle", "negative_prompt": "", "style": "(No style)", "width": 256, "height": 224, "steps": 20,
    "guidance": 4.5, "pag": 1, "seed": 7, "randomise": False, "number": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def limits(bundled: SanaPipeline) -> Limits:
    return Limits.of(bundled, DemoOptions(), load_styles())


def test_good_fields_make_a_wish(limits: Limits) -> None:
    wish = read_wish({**FIELDS, "width": 256.0, "style": "Anime", "negative_prompt": "rain"}, limits)
    assert (wish.width, wish.height, wish.seed, wish.number) == (256, 224, 7, 2)
    assert wish.full_prompt.startswith("anime frame of a red circle,") and wish.full_negative_prompt.startswith(
        "rain, "
    )


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("prompt", "", "The prompt is empty"),
        ("prompt", " \n ", "The prompt is empty"),
        ("prompt", None, "The prompt must be a text"),
        ("prompt", ["a"], "The prompt must be a text"),
        ("prompt", "\ud800", "The prompt must be a text"),
        ("prompt", "x" * (MAX_PROMPT + 1), "4001 characters"),
        ("negative_prompt", "x" * (MAX_PROMPT + 1), "The negative prompt has 4001"),
        ("style", "None of them", "no such style"),
        ("style", ["Anime"], "no such style"),
        ("width", None, "The width must be a whole number from 64 to 512"),
        ("width", 250, "multiple of 32 pixels; 224 and 256 are"),
        ("width", 0, "from 64 to 512"),
        ("height", 10**9, "The height must be"),
        ("height", 1e400, "The height must be"),
        ("height", 10**400, "The height must be"),
        ("steps", 0, "Steps must be a whole number from 1 to 100"),
        ("steps", 2.5, "Steps must be"),
        ("steps", True, "Steps must be"),
        ("steps", "20", "Steps must be"),
        ("guidance", math.nan, "Guidance must be a number from 1 (off) to 20"),
        ("guidance", 0.5, "Guidance must be"),
        ("guidance", None, "Guidance must be"),
        ("pag", -math.inf, "PAG must be"),
        ("seed", -1, "The seed must be"),
        ("seed", MAX_SEED, "The seed must be"),  # the second picture would have one more
        ("seed", 0.1, "The seed must be"),
        ("number", 9, "The number of pictures must be a whole number from 1 to 8"),
    ],
)
def test_a_bad_field_is_one_sentence(limits: Limits, field: str, value: object, says: str) -> None:
    with pytest.raises(WishError) as error:
        read_wish({**FIELDS, field: value}, limits)
    message = str(error.value)
    assert says in message and message.endswith(".") and "\n" not in message and len(message) < 200


def test_a_prompt_that_only_its_style_makes_too_long(limits: Limits) -> None:
    assert read_wish({**FIELDS, "prompt": "x" * MAX_PROMPT}, limits)
    with pytest.raises(WishError, match="too long with its style"):
        read_wish({**FIELDS, "prompt": "x" * MAX_PROMPT, "style": "Anime"}, limits)


def test_a_random_seed_is_drawn_and_the_field_is_not_read(limits: Limits) -> None:
    seeds = {read_wish({**FIELDS, "randomise": True, "seed": None}, limits).seed for _ in range(20)}
    assert len(seeds) == 20 and max(seeds) < DRAWN_SEEDS


def test_the_page_starts_with_the_options_and_what_the_model_can_do(bundled: SanaPipeline) -> None:
    limits = Limits.of(bundled, DemoOptions(step=150, cfg_scale=30, pag_scale=12, max_images=3), {})
    assert (limits.steps, limits.max_steps, limits.guidance, limits.max_guidance) == (150, 150, 30, 30)
    assert (limits.pag, limits.max_pag, limits.max_images) == (12, 12, 3)
    assert Limits.of(bundled, DemoOptions(), {}).steps == 20


def test_a_model_without_pag_starts_without_it(small: SanaPipeline) -> None:
    layers = small.config.model.pag_applied_layers
    small.config.model.pag_applied_layers = [99]
    try:
        limits = Limits.of(small, DemoOptions(), load_styles())
    finally:
        small.config.model.pag_applied_layers = layers
    assert (limits.pag, limits.max_pag) == (1.0, 1.0)
    with pytest.raises(WishError, match="PAG must be"):
        read_wish({**FIELDS, "width": 64, "height": 64, "pag": 2}, limits)


def test_a_distilled_model_takes_no_negative_prompt(limits: Limits) -> None:
    sprint = replace(limits, negative=False)
    with pytest.raises(WishError, match="cannot use a negative prompt"):
        read_wish({**FIELDS, "negative_prompt": "rain"}, sprint)
    assert read_wish({**FIELDS, "style": "Anime"}, sprint).full_negative_prompt == ""
