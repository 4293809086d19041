"""The order in which settings are chosen, against hand arithmetic, and what a refusal says."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sana.pipelines.plan_request import Job, PlanRequest, make_job
from sana.pipelines.plan_search import (
    MemoryLimitError,
    Settings,
    decodings,
    default_settings,
    describe,
    first_fitting,
    greatest,
    least,
    own_tile,
    placements,
    refusal,
    search,
)
from sana.pipelines.plan_stages import Estimator
from tests.pipelines.plan_stand_in import M, Maker, large_config


def estimator(**options: Any) -> Estimator:
    return Estimator(job(**options), Maker())


def job(**options: Any) -> Job:
    return make_job(large_config(), PlanRequest(**options))


@pytest.mark.parametrize(
    ("allowed", "chosen"),
    [
        # All networks are 9000 M; decoding a whole picture takes 3000 M more.
        (12_000, Settings()),
        # Tiles: 200 M and 2 M a pixel of their side; 768 px need 10736 M in all.
        (11_999, Settings(tile=768)),
        (10_000, Settings(tile=384)),
        (9_456, Settings(tile=128)),
        # One network at a time: the text encoder's 5000 M and 100 M decide.
        (9_455, Settings(offload="model")),
        (5_100, Settings(offload="model")),
        # Two of its layers, what is no layer, and 100 M: 1900 M. Of the autoencoder 1000 M stay.
        (5_099, Settings(offload="group")),
        (3_999, Settings(offload="group", tile=768)),
        (1_900, Settings(offload="group", tile=256)),
        # One unit: 1500 M of the text encoder, 600 M of the autoencoder.
        (1_899, Settings(offload="sequential", tile=512)),
        (1_500, Settings(offload="sequential", tile=256)),
        # An int8 text encoder needs 1000 M as "group"; the transformer's 1200 M and 200 M decide, then 1100 M.
        (1_499, Settings(offload="group", tile=128, text_quantization="int8")),
        (1_399, Settings(offload="sequential", tile=256, text_quantization="int8")),
        # The transformer too: 550 M and 200 M; the autoencoder's 600 M and 456 M decide.
        (1_299, Settings(offload="sequential", tile=128, quantization="int8", text_quantization="int8")),
    ],
)
def test_the_least_harm_that_fits(allowed: int, chosen: Settings):
    assert search(estimator(max_vram=allowed * M)) == chosen


def test_smaller_batches_come_before_group_offload_and_are_spread_evenly():
    # Denoising: 3000 M and 200 M a picture; text: 5000 M and 100 M a prompt, so ten prompts need 6000 M.
    chosen = search(estimator(batch=10, max_vram=5_800 * M))
    assert (chosen.batch, chosen.offload) == (5, "model"), "eight would fit, but then the second call makes two"
    assert search(estimator(batch=10, max_vram=5_800 * M, split=False)).offload == "group"


def test_a_batch_is_decoded_one_by_one_before_tiles_are_taken():
    chosen = search(estimator(batch=2, max_vram=13_000 * M))
    assert (chosen.tile, chosen.slicing, chosen.offload) == (None, True, "none")
    chosen = search(estimator(batch=2, max_vram=11_000 * M))
    assert (chosen.tile, chosen.slicing, chosen.offload) == (768, False, "none"), "tiles take one picture at a time"


def test_on_a_cpu_packed_copies_go_before_quality(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sana.pipelines.plan_request.pack_budget", lambda: 10**12)
    monkeypatch.setattr("sana.pipelines.plan_stages.pack_budget", lambda: 10**12)
    options = {"device": "cpu", "dtype": "bf16"}
    assert search(estimator(**options, max_vram=14_000 * M)) == Settings(packing=True)  # 9000 + 2000 + 3000
    assert search(estimator(**options, max_vram=11_600 * M)) == Settings(packing=True, tile=128)
    assert search(estimator(**options, max_vram=11_400 * M)) == Settings(tile=768)
    assert search(estimator(**options, max_vram=8_900 * M)) == Settings(tile=768, text_quantization="int8")


@pytest.mark.parametrize(
    "fixed",
    [
        {"offload": "none"}, {"tiling": 256}, {"tiling": "none"}, {"quantization": "nf4"},
        {"text_quantization": "none"},
        {"offload": "sequential", "quantization": "int8", "text_quantization": "nf4", "tiling": 512},
    ],
)  # fmt: skip
@given(allowed=st.integers(800, 13_000), batch=st.integers(1, 6))
@hypothesis_settings(max_examples=40, deadline=None)
def test_what_the_caller_fixed_is_never_changed_and_what_is_chosen_fits(
    fixed: dict[str, Any], allowed: int, batch: int
):
    estimate = estimator(max_vram=allowed * M, batch=batch, **fixed)
    try:
        chosen = search(estimate)
    except MemoryLimitError as error:
        assert error.needed > error.allowed == allowed * M
        return
    names = {"tiling": "tile"}
    for name, value in fixed.items():
        assert getattr(chosen, names.get(name, name)) == (None if value == "none" and name != "offload" else value)
    assert estimate.worst(chosen).total <= allowed * M
    assert 1 <= chosen.batch <= batch


@given(batch=st.integers(1, 5), side=st.sampled_from([512, 1024, 2048]), margin=st.integers(0, 500))
@hypothesis_settings(max_examples=40, deadline=None)
def test_what_a_refusal_proposes_fits(batch: int, side: int, margin: int):
    options = {"batch": batch, "height": side, "width": side, "use_resolution_binning": False, "margin": margin * M}
    with pytest.raises(MemoryLimitError) as caught:
        search(estimator(**options, max_vram=900 * M))
    proposed = re.search(r"max_vram (\d+\.\d+GB)", str(caught.value))
    assert proposed is not None
    search(estimator(**options, max_vram=proposed[1]))
    smaller = re.search(r"as (\d+)x(\d+)", str(caught.value))
    if smaller is not None:
        options |= {"height": int(smaller[1]), "width": int(smaller[2])}
        search(estimator(**options, max_vram=900 * M))


def test_a_refusal_is_one_sentence_with_the_numbers_and_what_fits():
    with pytest.raises(MemoryLimitError) as caught:
        search(estimator(max_vram="1GB", margin="100MB", offload="model"))
    message = str(caught.value)
    # "model" keeps the transformer whole: nf4 makes it 750 M and 200 M; the autoencoder's 1000 M and 456 M decide.
    assert message.startswith(
        "1024x1024 does not fit into 0.90GB (a margin of 0.10GB taken off): decoding needs 1.46GB"
    )
    assert "tiles of 128 px, model offload" in message
    assert "it fits with max_vram 1.56GB" in message
    assert "\n" not in message
    assert (caught.value.needed, caught.value.allowed, caught.value.stage) == (1456 * M, 900 * M, "decoding")


def test_a_refusal_names_the_fixed_setting_that_stands_in_the_way():
    with pytest.raises(MemoryLimitError, match=r"or with tiling none, offload model\."):
        search(estimator(max_vram="6GB", offload="none", tiling=256, quantization="none", text_quantization="none"))
    exact = {"quantization": "none", "text_quantization": "none"}
    with pytest.raises(MemoryLimitError, match=r"or with split true\."):  # 5000 M and 900 M of text
        search(estimator(max_vram="5.5GB", offload="model", batch=9, split=False, **exact))


def test_without_a_bound_nothing_is_chosen():
    assert search(estimator(batch=4)) == Settings(batch=4)
    assert search(estimator(offload="group", quantization="int8")) == Settings(offload="group", quantization="int8")


def test_large_pictures_are_tiled_by_the_autoencoder_itself():
    assert own_tile(job(height=2048, width=2048, use_resolution_binning=False)) is None
    large = job(height=2048, width=2080, use_resolution_binning=False)
    assert own_tile(large) == default_settings(large).tile == 448


def test_what_cannot_fit_is_not_computed():
    maker = Maker()
    search(Estimator(job(max_vram=5_100 * M), maker))
    calls = maker.asked
    assert len(calls) == len(set(map(repr, calls))), "nothing is computed twice"
    # Without offload only weights are asked for: with 9000 M of them no stage can fit.
    assert [one[0] for one in calls if one[0] != "weights"] == ["encode_text", "denoise", "decode"]


def test_decodings_go_from_free_to_dear():
    assert decodings(job(), 1) == (
        (None, False), (768, False), (512, False), (384, False), (256, False), (128, False)
    )  # fmt: skip
    assert decodings(job(), 2)[:3] == ((None, False), (None, True), (768, False))
    assert decodings(job(device="cpu"), 2)[:2] == ((None, False), (768, False))
    assert decodings(job(tiling="none"), 1) == ((None, False),)
    assert decodings(job(tiling=96), 1) == ((96, False),)


def test_placements():
    assert [[place.offload for place in group] for group in placements(job())] == [
        ["none", "model"], ["group"], ["sequential"]
    ]  # fmt: skip
    assert [[place.offload for place in group] for group in placements(job(offload="group"))] == [["group"]]


@given(high=st.integers(0, 60), bound=st.integers(0, 70))
def test_greatest(high: int, bound: int):
    assert greatest(high, lambda number: number <= bound) == min(high, bound)


def test_least_needs_no_more_than_any_choice():
    _, stage = least(estimator(batch=3))
    assert stage.total == 1056 * M  # the autoencoder's 600 M and tiles of 128 px
    assert refusal(estimator(max_vram=1), 1).needed == stage.total


def test_describe():
    words = describe(Settings(batch=2, tile=256, quantization="int8", text_quantization="nf4"), job())
    assert words == "2 pictures a call, tiles of 256 px, no offload, int8 weights, nf4 text encoder"
    assert describe(Settings(), job(device="cpu")) == "1 picture a call, no tiles, no packed weights"


@given(st.data())
def test_guessing_chooses_what_trying_every_tile_does(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 9))
    areas = sorted(data.draw(st.sets(st.integers(1, 4000), min_size=count, max_size=count)), reverse=True)
    needs = sorted(data.draw(st.lists(st.integers(0, 100), min_size=count, max_size=count)), reverse=True)
    limit, known = data.draw(st.integers(0, 100)), [(5000, 100)] if data.draw(st.booleans()) else []
    asked: list[int] = []

    def ask(index: int) -> int:
        asked.append(index)
        return needs[index]

    expected = next((index for index, need in enumerate(needs) if need <= limit), None)
    assert first_fitting(areas, ask, limit, known) == expected
    assert len(asked) == len(set(asked)), "a question is asked once"


@pytest.mark.parametrize("limit", [100, 600, 1500, 3000])
def test_few_questions_are_asked_where_needs_lie_on_a_line(limit: int) -> None:
    areas, asked = [side**2 for side in (2048, 1536, 1024, 768, 512, 384, 256, 128)], []

    def ask(index: int) -> int:
        asked.append(index)
        return 50 + areas[index] // 1000

    first_fitting(areas, ask, limit, [(4096**2, 50 + 4096**2 // 1000)])
    assert len(asked) <= 3
