"""Presets: sizes that the model makes itself, within the bounds of the page."""

import pytest

from app.presets import ASPECTS, CUSTOM, STEP, Presets
from sana.data.aspect_ratio import ASPECT_RATIOS
from sana.pipelines.inputs import plan_size


@pytest.mark.parametrize("image_size", [256, 512, 1024, 2048, 4096])
def test_presets_at_the_models_size_are_never_resized(image_size: int) -> None:
    presets = Presets(image_size)
    for aspect, (wide, high) in ASPECTS.items():
        width, height = presets.size(aspect, image_size)
        assert not plan_size(height, width, factor=32, image_size=image_size, binning=True).binned, aspect
        assert width / height == pytest.approx(wide / high, rel=0.13)


def test_presets_of_1024_are_entries_of_its_table() -> None:
    table = set(ASPECT_RATIOS["ASPECT_RATIO_1024_TEST"].values())
    presets = Presets(1024)
    assert {presets.size(aspect, 1024)[::-1] for aspect in ASPECTS} <= table
    assert presets.size("16:9", 1024) == (1344, 768) and presets.size("9:16", 1024) == (768, 1344)


@pytest.mark.parametrize("image_size", [32, 64, 224, 256, 512, 720, 1024, 2048, 2880, 4096])
@pytest.mark.parametrize("start", [None, 100, 512, 9000])
def test_every_preset_is_within_the_bounds(image_size: int, start: int | None) -> None:
    presets = Presets(image_size, start=start)
    assert presets.first in presets.sides
    sizes = [side for row in presets.table().values() for size in row.values() for side in size]
    assert all(presets.smallest <= side <= presets.greatest and side % STEP == 0 for side in sizes)


def test_the_page_starts_with_the_size_that_was_asked_for() -> None:
    presets = Presets(1024, start=512)
    assert presets.size("1:1", presets.first) == (512, 512)
    assert presets.describe(512) == "512 px, reduced from 1024"
    assert presets.describe(1024) == "1024 px, the model's own"
    assert presets.describe(2048) == "2048 px, enlarged from 1024"


def test_a_size_finds_its_preset() -> None:
    presets = Presets(256)
    for side, row in presets.table().items():
        for size in row.values():
            aspect, found = presets.find(*size)
            assert presets.size(aspect, found) == size, (side, size)
    assert presets.find(256, 256) == ("1:1", 256)
    assert presets.find(64, 512) == (CUSTOM, None)


def test_a_model_without_a_table_says_so() -> None:
    presets = Presets(224)
    assert not presets.trained and presets.size("1:1", 224) == (224, 224)
    assert "not trained" in presets.describe(448)
