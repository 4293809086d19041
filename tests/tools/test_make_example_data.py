"""The shipped example data: small, complete, of several shapes, and drawn again the same."""

import random
from pathlib import Path

from sana.data import DATASETS
from sana.data.sample import Dataset, Sample
from tools.make_example_data import main

EXAMPLE = Path(__file__).parents[2] / "asset/example_data"


def dataset_of(folder: Path, **options) -> Dataset:
    return DATASETS["SanaImgDataset"](data_dir=str(folder), image_size=64, **options)


def samples(folder: Path) -> list[Sample]:
    dataset = dataset_of(folder)
    return [dataset.load(index, random.Random(0)) for index in range(len(dataset))]


def test_they_are_small_and_complete() -> None:
    assert sum(path.stat().st_size for path in EXAMPLE.iterdir()) < 400_000
    assert [sample.image.shape for sample in samples(EXAMPLE)] == [(3, 64, 64)] * 12


def test_they_have_several_shapes_and_captions_that_are_drawn_by_score() -> None:
    captioners = ("_VILA1-5-13B", "_InternVL2-26B")
    dataset = dataset_of(
        EXAMPLE, multi_scale=True, aspect_ratio_type="ASPECT_RATIO_256", external_caption_suffixes=captioners,
        external_clipscore_suffixes=[*(f"{captioner}_clip_score" for captioner in captioners), "_prompt_clip_score"],
    )  # fmt: skip
    assert len(set(dataset.buckets())) >= 3
    kinds = {dataset.load(0, random.Random(seed)).caption_type for seed in range(40)}
    assert kinds == {"prompt", "VILA1-5-13B", "InternVL2-26B"}


def test_they_are_drawn_again_the_same(tmp_path) -> None:
    assert main(["--folder", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in EXAMPLE.iterdir()}
    for first, second in zip(samples(EXAMPLE), samples(tmp_path), strict=True):
        assert (first.key, first.caption) == (second.key, second.caption)
        difference = first.image.float() - second.image.float()
        assert difference.abs().mean() < 0.01 * 127.5  # levels of 255: other versions of an encoder differ a little
