"""The page without a browser: the functions behind its buttons, and what its server gives away."""

import asyncio
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio
import httpx
import numpy as np
import pytest
from PIL import Image

from app.demo import build_demo
from app.demo_parts import launch_settings
from app.options import DemoOptions
from app.safety_check import NoCheck
from sana.pipelines.images import read_recipe
from sana.pipelines.sana_pipeline import SanaPipeline

IDS = {
    "prompt", "negative-prompt", "style", "aspect", "image-size", "width", "height", "steps", "guidance", "pag", "seed",
    "randomise", "number", "generate", "cancel", "gallery", "status", "recipe", "download", "restore", "history",
    "safety-notice", "examples", "error",
}  # fmt: skip


@pytest.fixture
def demo(small: SanaPipeline) -> Iterator[Any]:
    demo = build_demo(small, DemoOptions(step=2, max_queue=1), NoCheck("**A notice** that stays."))
    yield demo
    demo.close(verbose=False)


def values(page: Any, **changes: Any) -> list[Any]:
    """Returns what a browser sends for the fields, in their order."""
    start = {name: component.value for name, component in page.parts.fields.items()}
    return list({**start, "prompt": "a red circle", "randomise": False, **changes}.values())


def press(page: Any, stored: object = (), owner: str | None = None, **changes: Any) -> list[dict[Any, Any]]:
    """Presses Generate; returns the page's changes."""

    async def all_changes() -> list[dict[Any, Any]]:
        return [change async for change in page.generate(list(stored), *values(page, **changes), owner=owner)]

    return asyncio.run(all_changes())


def together(changes: list[dict[Any, Any]]) -> dict[Any, Any]:
    """Returns what the page shows after its changes."""
    shown: dict[Any, Any] = {}
    for change in changes:
        shown |= change
    return shown


def text(html: str) -> str:
    return re.sub(r"<[^>]+>", " ", html).strip()


def test_the_parts_have_the_names_that_tests_and_documents_use(demo: Any) -> None:
    ids = [block.elem_id for block in demo.blocks.values() if block.elem_id]
    assert set(ids) >= IDS and len(ids) == len(set(ids))


def test_the_safety_notice_is_always_there(demo: Any) -> None:
    notice = next(block for block in demo.blocks.values() if block.elem_id == "safety-notice")
    assert notice.visible is True and notice.value == "**A notice** that stays."


def test_nothing_is_drawn_or_loaded_by_building(small_folder: Path) -> None:
    pipeline = SanaPipeline.from_pretrained(small_folder, device="cpu")
    demo = build_demo(pipeline, safety=NoCheck())
    assert pipeline._text_encoder is None and pipeline._autoencoder is None
    demo.close(verbose=False)


def test_generate_makes_the_pictures_and_shows_how(demo: Any) -> None:
    page = demo.actions
    changes = press(page, ["an old prompt"], number=2, seed=11)
    first, shown = changes[0], together(changes)
    parts = page.parts
    assert first[parts.generate].interactive is False and first[parts.cancel].interactive is True
    assert shown[parts.generate].interactive is True and shown[parts.cancel].interactive is False
    assert shown[parts.error] == "" and "2 pictures in" in text(shown[parts.status])
    assert [one["caption"] for one in shown[parts.gallery].value] == ["seed 11", "seed 12"]
    assert [picture.recipe.seed for picture in shown[parts.pictures]] == [11, 12]
    assert "<dd>11</dd>" in shown[parts.recipe] and "a red circle" in shown[parts.recipe]
    assert shown[parts.history_state] == ["a red circle", "an old prompt"]
    assert shown[parts.history].visible and shown[parts.history].raw_samples == [["a red circle"], ["an old prompt"]]


def test_the_file_to_download_is_the_pipelines_picture_with_its_recipe(demo: Any, small: SanaPipeline) -> None:
    shown = together(press(demo.actions, seed=4, width=96))
    picture = shown[demo.actions.parts.pictures][0]
    expected = small("a red circle", 64, 96, num_inference_steps=2, guidance_scale=5.0,
                     pag_scale=demo.actions.limits.pag, seed=4, output_type="pil")[0]  # fmt: skip
    with Image.open(picture.path) as image:
        assert np.array_equal(np.asarray(image), np.asarray(expected))
    assert read_recipe(picture.path) == picture.recipe.as_dict()
    assert Path(shown[demo.actions.parts.download].value["path"]) == picture.path


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("prompt", "", "The prompt is empty"),
        ("prompt", "x" * 4001, "4001 characters"),
        ("steps", 0, "Steps must be"),
        ("guidance", float("nan"), "Guidance must be"),
        ("width", 10**6, "The width must be"),
        ("style", "none of them", "no such style"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_else(demo: Any, field: str, value: object, says: str) -> None:
    changes = press(demo.actions, **{field: value})
    assert len(changes) == 1 and list(changes[0]) == [demo.actions.parts.error]
    assert says in text(changes[0][demo.actions.parts.error])


def test_a_random_seed_is_shown_where_it_can_be_kept(demo: Any) -> None:
    shown = together(press(demo.actions, randomise=True, seed=None))
    seed = shown[demo.actions.parts.fields["seed"]]
    assert (
        seed == shown[demo.actions.parts.pictures][0].recipe.seed
        and f"<dd>{seed}</dd>" in shown[demo.actions.parts.recipe]
    )


def test_cancel_frees_the_page_and_says_what_was_kept(demo: Any) -> None:
    page = demo.actions

    async def run() -> dict[Any, Any]:
        shown: dict[Any, Any] = {}
        async for change in page.generate([], *values(page, steps=100, number=8), owner="me"):
            shown |= change
            if page.parts.gallery in shown:
                page.cancel("me")
        return shown

    shown = asyncio.run(run())
    kept = len(shown[page.parts.pictures])
    assert 1 <= kept < 8 and re.search(
        rf"Cancelled after .*; {kept} of 8 pictures kept", text(shown[page.parts.status])
    )
    assert shown[page.parts.generate].interactive is True
    assert len(together(press(page, owner="me"))[page.parts.pictures]) == 1


def test_a_browser_that_goes_away_stops_its_work(demo: Any) -> None:
    page = demo.actions

    async def leave() -> None:
        changes = page.generate([], *values(page, steps=100, number=8), owner="me")
        await anext(changes)
        await changes.aclose()

    asyncio.run(leave())
    assert len(together(press(page, owner="me", seed=1))[page.parts.pictures]) == 1


def test_a_second_wish_of_one_page_and_a_full_queue_are_said(demo: Any) -> None:
    page = demo.actions

    async def run() -> list[str]:
        said = []
        first = page.generate([], *values(page, steps=100, number=8), owner="a")
        await anext(first)
        second = page.generate([], *values(page), owner="b")
        assert "Waiting: number 1" in (await anext(second))[page.parts.status]
        for owner in ("a", "c"):
            async for change in page.generate([], *values(page), owner=owner):
                said.append(text(change[page.parts.error]))
        await second.aclose()
        await first.aclose()
        return said

    busy, full = asyncio.run(run())
    assert "making pictures already" in busy and "The queue is full" in full


def test_choosing_a_picture_shows_its_recipe(demo: Any) -> None:
    page = demo.actions
    pictures = together(press(page, number=2, seed=30))[page.parts.pictures]
    change = page.select(pictures, 1)
    assert "<dd>31</dd>" in change[page.parts.recipe] and change[page.parts.chosen] == 1
    assert Path(change[page.parts.download].value["path"]) == pictures[1].path
    assert page.select(pictures, 2) == page.select([], 0) == {}
    shutil.rmtree(pictures[1].path.parent)
    assert page.select(pictures, 1)[page.parts.download].interactive is False  # it was one too many


def test_a_dropped_picture_restores_every_field_and_the_same_picture(demo: Any, tmp_path: Path) -> None:
    page, parts = demo.actions, demo.actions.parts
    asked = {"prompt": "two blue stars", "negative_prompt": "rain", "width": 96, "height": 64, "steps": 3, "seed": 77,
             "guidance": 3.5, "pag": 1.0}  # fmt: skip
    original = together(press(page, **asked))[parts.pictures][0]
    dropped = tmp_path / "dropped.png"
    shutil.copyfile(original.path, dropped)
    change = page.restore(str(dropped))
    restored = {name: change[component] for name, component in parts.fields.items() if component in change}
    assert {**restored, **asked, "randomise": False, "number": 1} == restored
    assert "Generate makes the same picture" in change[parts.status] and change[parts.error] == ""
    again = together(press(page, **restored))[parts.pictures][0]
    assert again.recipe == original.recipe
    assert again.path.read_bytes() == original.path.read_bytes()


def test_reuse_takes_the_chosen_pictures_settings(demo: Any) -> None:
    page, parts = demo.actions, demo.actions.parts
    pictures = together(press(page, number=2, seed=5, style="Anime"))[parts.pictures]
    change = page.reuse(pictures, 1)
    assert change[parts.fields["seed"]] == 6 and change[parts.fields["style"]] == "(No style)"
    assert change[parts.fields["prompt"]].startswith("anime frame of a red circle")


def test_a_dropped_picture_of_other_weights_says_that_it_will_differ(demo: Any, bundled: SanaPipeline) -> None:
    press(demo.actions)
    other = build_demo(bundled, DemoOptions(step=1), NoCheck())
    picture = together(press(other.actions, width=64, height=64))[other.actions.parts.pictures][0]
    status = demo.actions.reuse([picture], 0)[demo.actions.parts.status]
    assert "weights" in status and "will differ" in status
    other.close(verbose=False)


def test_a_dropped_file_that_is_no_picture_of_ours_is_one_sentence(demo: Any, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    for name, says in (("plain", "holds no recipe"), ("text", "is no PNG")):
        change = demo.actions.restore(str(tmp_path / f"{name}.png"))
        assert says in change[demo.actions.parts.error] and str(tmp_path) not in change[demo.actions.parts.error]
        assert not set(change) & set(demo.actions.parts.fields.values())


def test_the_history_gives_prompts_back_and_forgets(demo: Any) -> None:
    page = demo.actions
    assert page.recall(["a", "b"], 1) == "b"
    assert page.show_history([])[page.parts.history].visible is False
    assert page.forget()[page.parts.history_state] == []
    assert page.recall("nonsense", 0) == gradio.skip()


def test_no_program_finds_an_endpoint(demo: Any) -> None:
    assert demo.get_api_info()["named_endpoints"] == {} == demo.get_api_info()["unnamed_endpoints"]


def test_the_server_gives_the_very_file_and_no_other(demo: Any, tmp_path: Path) -> None:
    picture = together(press(demo.actions))[demo.actions.parts.pictures][0]
    (secret := tmp_path / "secret.txt").write_text("secret")
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False, **launch_settings())
    given = httpx.get(f"{url}gradio_api/file={picture.path}")
    assert given.status_code == 200 and given.content == picture.path.read_bytes()
    for path in (Path(__file__), secret, Path("/etc/passwd"), picture.path.parent):
        assert httpx.get(f"{url}gradio_api/file={path}").status_code in (403, 404), path
    page = httpx.get(url).text
    assert "fonts.googleapis" not in page and "cdn" not in page.lower()
    demo.close(verbose=False)
    assert not picture.path.exists()
