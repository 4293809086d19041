"""A list of prompts to a folder: names, seeds, skipping and resuming, sharing, the index, what is in a recipe."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sana.pipelines import batch
from sana.pipelines.images import read_recipe
from sana.pipelines.options import InferenceOptions
from sana.pipelines.prompts import PromptFileError, safe_name

PROMPTS = ["a cat", "a/dog\\..:*?", "雪山日出 🌸", "a cat", "x" * 400, "x" * 399 + "y"]


@pytest.fixture
def options(model_folder: Path, tmp_path: Path) -> InferenceOptions:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    return InferenceOptions(
        model_path=str(model_folder), txt_file=str(prompts), work_dir=str(tmp_path / "out"), step=2, seed=10, bs=4,
        device="cpu",
    )  # fmt: skip


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_every_prompt_gets_a_picture_with_its_recipe(options):
    (report,) = batch.run(options)
    recipes = [read_recipe(path) for path in report.made]
    assert [recipe["prompt"] for recipe in recipes] == PROMPTS
    assert [recipe["seed"] for recipe in recipes] == [10, 11, 12, 13, 14, 15]
    assert {recipe["sampler"] for recipe in recipes} == {"flow_dpm-solver"}
    assert {recipe["num_inference_steps"] for recipe in recipes} == {2}
    assert len({recipe["weights"] for recipe in recipes}) == 1
    assert len(set(report.made)) == len(PROMPTS)
    assert all(path.parent == report.folder and len(path.name.encode()) < 255 for path in report.made)
    assert report.index == report.folder / "index.png"
    assert not [path for path in report.folder.iterdir() if path.name.startswith(".")]


def test_bs_changes_no_picture_and_no_name(options, tmp_path):
    (four,) = batch.run(options)
    (one,) = batch.run(replace(options, bs=1, work_dir=str(tmp_path / "one")))
    assert [path.name for path in four.made] == [path.name for path in one.made]
    for first, second in zip(four.made, one.made, strict=True):
        assert np.array_equal(pixels(first), pixels(second))


def test_a_second_run_skips_and_another_recipe_overwrites_nothing(options):
    (first,) = batch.run(options)
    before = {path: path.stat().st_mtime_ns for path in first.made}
    (again,) = batch.run(options)
    assert not again.made and again.skipped == first.made
    (changed,) = batch.run(replace(options, cfg_scale=3.0))
    assert len(changed.made) == len(PROMPTS) and not set(changed.made) & set(first.made)
    assert {path: path.stat().st_mtime_ns for path in first.made} == before


def test_a_stopped_run_goes_on_where_it_was(options, monkeypatch):
    saved = []
    real = batch.save_png

    def stop_at_the_third(image, path, recipe):
        if len(saved) == 2:
            raise KeyboardInterrupt
        real(image, path, recipe)
        saved.append(path)

    monkeypatch.setattr(batch, "save_png", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        batch.run(options)
    monkeypatch.setattr(batch, "save_png", real)
    saved[1].write_bytes(saved[1].read_bytes()[:100])  # a torn file is no finished picture
    (report,) = batch.run(options)
    assert report.skipped == saved[:1] and len(report.made) == len(PROMPTS) - 1


def test_the_part_of_the_list_keeps_names_and_seeds(options, tmp_path):
    (whole,) = batch.run(options)
    (part,) = batch.run(replace(options, start_index=3, end_index=5, work_dir=str(tmp_path / "part")))
    assert [path.name for path in part.made] == [path.name for path in whole.made[3:5]]


def test_processes_share_the_list_and_the_last_index_shows_all(options, monkeypatch):
    (whole,) = batch.run(replace(options, work_dir=options.work_dir + "_whole"))
    monkeypatch.setattr(batch, "_wait_for_all", lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        parts += batch.run(options)
    second, first = parts
    assert second.index is None and first.index is not None
    assert sorted(path.name for path in first.made + second.made) == sorted(path.name for path in whole.made)
    assert np.array_equal(pixels(first.index), pixels(whole.index))


def test_json_fields_and_suffixes_decide_size_and_seed(options, tmp_path):
    file = tmp_path / "prompts.json"
    entries = {
        "first": {"prompt": "a cat", "seed": 3, "height": 96, "width": 64, "negative_prompt": "blurry"},
        "second": {"prompt": "a dog --hw 64:128"},
    }
    file.write_text(json.dumps(entries), encoding="utf-8")
    (report,) = batch.run(replace(options, txt_file=None, json_file=str(file)))
    first, second = (read_recipe(path) for path in report.made)
    assert (first["seed"], first["negative_prompt"]) == (3, "blurry")
    assert (second["seed"], second["prompt"]) == (11, "a dog")
    assert [pixels(path).shape for path in report.made] == [(96, 64, 3), (64, 128, 3)]


def test_an_ablation_makes_a_folder_for_each_value(options):
    reports = batch.run(replace(options, ablation_key="step", ablation_selections=[1, 3], end_index=1))
    assert [report.folder.name for report in reports] == ["step_1", "step_3"]
    assert [read_recipe(report.made[0])["num_inference_steps"] for report in reports] == [1, 3]


def test_words_of_the_folder_tar_and_dirname(options, tmp_path):
    named = replace(
        options, dataset="mini", add_label="v2/x", exist_time_prefix="0101", if_save_dirname=True, tar_and_del=True,
        end_index=2,
    )  # fmt: skip
    (report,) = batch.run(named)
    assert report.folder == tmp_path / "out" / "0101_mini_v2 x.tar"
    assert (tmp_path / "out" / "dirname.txt").read_text() == "0101_mini_v2 x\n"
    with tarfile.open(report.folder) as tar:
        assert len(tar.getnames()) == 3 and all(name.startswith("0101_mini_v2 x/") for name in tar.getnames())
    assert not report.folder.with_suffix("").exists()


def test_limits_of_the_list(options):
    assert len(batch.read_items(replace(options, sample_nums=3))) == 3
    assert len(batch.read_items(replace(options, debug=True))) == 2
    with pytest.raises(ValueError, match="No prompt is left"):
        batch.read_items(replace(options, start_index=20))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bs": 0}, "bs must be"),
        ({"step": 0}, "step must be"),
        ({"cfg_scale": float("nan")}, "guidance_scale must be"),
        ({"pag_scale": float("inf")}, "pag_guidance_scale must be"),
        ({"interval_guidance": (0.0,)}, "interval_guidance must be"),
        ({"start_index": 5, "end_index": 5}, "start_index"),
        ({"ablation_key": "step"}, "belong together"),
        ({"ablation_key": "bs", "ablation_selections": [1.0]}, "ablation_key must be"),
        ({"json_file": "x.json"}, "give one of them"),
        ({"overrides": ["--model.x=1"]}, "needs --config"),
    ],
)
def test_bad_options_are_named(options, change, message):
    with pytest.raises(ValueError, match=message):
        replace(options, **change)


@pytest.mark.parametrize("side", [0, -1, 10**9])
def test_an_impossible_size_writes_nothing(options, side):
    with pytest.raises(ValueError, match="must be a whole number of pixels"):
        batch.run(replace(options, custom_image_size=side))
    assert not Path(options.work_dir).exists()


def test_a_bad_prompt_file_is_found_before_the_model_is_opened(options, tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "open_pipeline", lambda *given: pytest.fail("the model was opened"))
    (tmp_path / "empty.txt").write_text("\n \n")
    for name in ("empty.txt", "missing.txt"):
        with pytest.raises(PromptFileError, match=name):
            batch.run(replace(options, txt_file=str(tmp_path / name)))


def test_settings_that_change_pixels_change_the_recipe_and_exact_ones_do_not(options, tmp_path):
    """A picture made with other settings is not taken as done; tiles are exact, so such a picture is."""
    one = replace(options, end_index=1, use_resolution_binning=False, custom_image_size=128)
    (plain,) = batch.run(one)
    for change in (
        {"step_cache": 2.0, "step": 8},
        {"max_text_tokens": 3},
        {"upscale_from": 64},
        {"upscale_from": 64, "upscale_strength": 0.8},
        {"use_resolution_binning": True},
        {"quantization": "nf4"},
        {"text_quantization": "nf4"},
    ):
        (report,) = batch.run(replace(one, **change))
        assert len(report.made) == 1 and not report.skipped, change
    (tiled,) = batch.run(replace(one, vae_tiling=64))
    assert tiled.skipped == plain.made and not tiled.made


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["model", "sequential", "group"])
def test_offload_changes_no_picture_and_no_name(options, tmp_path, kind):
    (plain,) = batch.run(replace(options, device="cuda"))
    (offloaded,) = batch.run(replace(options, device="cuda", offload=kind, work_dir=str(tmp_path / kind)))
    assert [path.name for path in offloaded.made] == [path.name for path in plain.made]
    for first, second in zip(plain.made, offloaded.made, strict=True):
        assert np.array_equal(pixels(first), pixels(second))


def test_large_sizes_of_a_list_pass_and_are_made_as_they_are(options, tmp_path):
    """Of the bundled model, whose weights nobody loads: a binned picture is made at 256 px and enlarged, others not."""
    (tmp_path / "large.txt").write_text("a cat\na dog --hw 4096:2048\na fox --ar 1:4\na cow --hw 1000:4096\n")
    listed = replace(options, model_path=None, txt_file=str(tmp_path / "large.txt"), custom_image_size=4096)
    exact = replace(listed, use_resolution_binning=False)
    pipeline, _ = batch.name_pipeline(listed)
    items = [item for _, item, _ in batch.read_items(listed)]
    binned = [batch.image_size(item, listed, pipeline) for item in items]
    assert [(size.height, size.width) for size in binned[:2]] == [(4096, 4096), (4096, 2048)]
    assert (binned[2].height, binned[2].width) == (2048, 8192)  # the 4096 table's shape of the ratio
    assert [size.model_height * size.model_width <= 256 * 288 for size in binned] == [True] * 4
    for item, size in zip(items[:3], binned, strict=False):
        for own in (exact, replace(listed, upscale_from=256)):
            made = batch.image_size(item, own, pipeline)
            assert (made.model_height, made.model_width) == (size.height, size.width)
    with pytest.raises(ValueError, match="height 1000 is not a multiple of 32"):
        batch.image_size(items[3], exact, pipeline)
    with pytest.raises(ValueError, match="makes no picture smaller"):
        batch.image_size(items[1], replace(listed, upscale_from=4096), pipeline)
    assert pipeline.transformer is None and pipeline._autoencoder is None


def test_names_do_not_depend_on_the_hash_of_others():
    taken: set[str] = set()
    assert len({safe_name(prompt, taken) for prompt in PROMPTS}) == len(PROMPTS)
