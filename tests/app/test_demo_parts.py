"""The arrangement of the page: its style sheet and theme ask nobody for anything."""

import re
from pathlib import Path
from typing import Any

import pytest

from app.demo import build_demo
from app.demo_parts import launch_settings
from app.options import DemoOptions
from app.presets import ASPECTS, CUSTOM
from app.safety_check import NoCheck
from sana.pipelines.sana_pipeline import SanaPipeline


def test_the_look_comes_from_here_alone() -> None:
    settings = launch_settings()
    sheet = "".join(Path(path).read_text(encoding="utf-8") for path in settings["css_paths"])
    assert "url(" not in sheet and "@import" not in sheet and "http" not in sheet
    assert settings["theme"]._stylesheets == [] and settings["show_error"] is False


def test_the_style_sheet_names_parts_that_exist(small: SanaPipeline) -> None:
    demo = build_demo(small, safety=NoCheck())
    ids = {block.elem_id for block in demo.blocks.values() if block.elem_id}
    sheet = re.sub(r"/\*.*?\*/", "", Path(launch_settings()["css_paths"][0]).read_text(encoding="utf-8"), flags=re.S)
    selectors = re.sub(r"\{[^{}]*\}", " ", sheet)
    assert set(re.findall(r"#([a-z][a-z-]*)", selectors)) <= ids
    demo.close(verbose=False)


@pytest.mark.parametrize("changes", [{}, {"image_size": 128, "step": 7, "cfg_scale": 3.0, "seed": 9, "max_images": 1}])
def test_the_page_starts_with_the_options(small: SanaPipeline, changes: dict[str, Any]) -> None:
    options = DemoOptions(**changes)
    demo = build_demo(small, options, NoCheck())
    fields = demo.actions.parts.fields
    side = options.image_size or small.config.model.image_size
    assert (fields["width"].value, fields["height"].value) == (side, side)
    assert fields["steps"].value == (20 if options.step == -1 else options.step)
    assert (fields["guidance"].value, fields["seed"].value) == (options.cfg_scale, options.seed)
    assert demo.actions.parts.image_size.value == side
    assert [name for name, _ in demo.actions.parts.aspect.choices] == [*ASPECTS, CUSTOM]
    assert set(demo.actions.parts.sizes[str(side)]) == set(ASPECTS)
    demo.close(verbose=False)
