"""Runners of the recorded cases of the training kinds: datasets, and the transform without a data set."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional

from sana.data import DATASETS
from sana.data.captions import caption_probabilities
from sana.data.transforms import get_transform, normalise_images
from tests.parity.common import Case


def run_dataset(case: Case) -> None:
    """The class stands at the start of `made_by`."""
    name = re.match(r"\w+", case.raw["made_by"])
    assert name is not None
    {"SanaImgDataset": run_image_folder, "SanaWebDatasetMS": run_web_dataset}[name[0]](case)


def run_image_folder(case: Case) -> None:
    """Every run: an image, its draw of a caption from a seed, and the probabilities of the draw."""
    images = case.tensors("out.img.")
    fixed = _options(case)
    unseen = set(images)
    for run in case.call["runs"]:
        options = {key: run[key] for key in ("clip_thr", "clip_thr_temperature")}
        dataset = DATASETS["SanaImgDataset"](**fixed, **options)
        index = [dataset.key(i) for i in range(len(dataset))].index(run["img"])
        sample = dataset.load(index, random.Random(run["seed"]))
        what = f"{run['img']} {options}"
        assert (sample.caption_type, sample.caption) == (run["caption_type"], run["caption"]), what
        assert (sample.clip_score or "0.0") == run["clipscore_str"], what
        _assert_probabilities(dataset, index, run, options)
        assert sample.image is not None and sample.image.shape == (3, fixed["image_size"], fixed["image_size"])
        if run["img"] in images:
            case.assert_close(normalise_images(sample.image), images[run["img"]], what)
            unseen.discard(run["img"])
    assert not unseen
    assert len(dataset) * 2000 == case.call["item"]["len"]  # bug B13: the official list is repeated


def _options(case: Case) -> dict[str, Any]:
    constructor = case.constructor
    return {
        "data_dir": str(_data_dir(case)),
        "image_size": constructor["resolution"],
        "aspect_ratio_type": "ASPECT_RATIO_1024",
        "multi_scale": False,
        "external_caption_suffixes": constructor["external_caption_suffixes"],
        "external_clipscore_suffixes": constructor["external_clipscore_suffixes"],
    }


def _data_dir(case: Case) -> Path:
    """The folder that `made_by` names as data_dir=, beside the case's file."""
    named = re.search(r"data_dir=([\w./-]+)", case.raw["made_by"])
    assert named is not None
    return case.path(case.raw["file"]).parent / named[1]


def _assert_probabilities(dataset: Any, index: int, run: dict[str, Any], options: dict[str, float]) -> None:
    captions, scores = dataset.scored_captions(index)
    known = [(name, score) for name, score in scores if name in captions]
    names, probabilities = caption_probabilities(known, **options)
    assert names == (run["candidates"] or [])
    assert probabilities == pytest.approx(run["probabilities"] or [], rel=1e-12, abs=0)


def run_web_dataset(case: Case) -> None:
    """Every row: a record by its index, its draw of a caption from a seed, and the size of its bucket."""
    stored = case.load(case.raw["file"])
    table = re.search(r"aspect_ratio_type='(\w+)'", case.raw["made_by"])
    assert table is not None
    folder = _data_dir(case)
    dataset = DATASETS["SanaWebDatasetMS"](
        data_dir=str(folder),
        image_size=256,
        aspect_ratio_type=table[1],
        multi_scale=True,
        **_suffixes(folder),
    )
    buckets = dataset.buckets()
    for row in case.call["rows"]:
        index = row["idx"]
        sample = dataset.load(index, random.Random(row["seed"]))
        what = f"row {index}"
        assert (sample.caption_type, sample.caption) == (row["caption_type"], row["caption"]), what
        assert (sample.clip_score or "0.0") == row["clipscore"], what
        assert float(buckets[index]) == row["aspect_ratio"], what
        assert row["get_data_info"]["key"] in sample.key, what
        assert sample.image is not None and list(sample.image.shape) == row["img_shape"], what
        _assert_picture(case, stored, index, normalise_images(sample.image))


def _suffixes(folder: Path) -> dict[str, list[str]]:
    """The endings of the files with captions and scores beside the shards: `SHARD<ending>.json`."""
    shards = [path.stem for path in folder.glob("*.tar")]
    endings = {
        path.stem.removeprefix(shard)
        for shard in shards
        for path in folder.glob(f"{shard}_*.json")
    }  # fmt: skip
    return {
        "external_caption_suffixes": sorted(ending for ending in endings if not ending.endswith("_clip_score")),
        "external_clipscore_suffixes": sorted(ending for ending in endings if ending.endswith("_clip_score")),
    }


def _assert_picture(case: Case, stored: dict[str, torch.Tensor], index: int, image: torch.Tensor) -> None:
    """What was kept of the picture, as `made_by` says: means, means of 8 x 8 pixels, and a cut."""
    views = {
        "img_mean": image.mean(dim=(1, 2)),
        "img_small": functional.avg_pool2d(image[None], 8)[0],
        "img_crop": image[:, 60:92, 60:92],
    }
    for view, actual in views.items():
        if (expected := stored.get(f"out.{view}.{index}")) is not None:
            case.assert_close(actual, expected, f"{view} of row {index}")


def run_transform(case: Case) -> None:
    """Outputs are named out.TRANSFORM_SIZE; each is of the picture in.image_uint8_hwc."""
    picture = Image.fromarray(case.tensor("in.image_uint8_hwc").numpy())
    expected = case.tensors("out.")
    assert expected
    for name, tensor in expected.items():
        transform, _, size = name.rpartition("_")
        case.assert_close(normalise_images(get_transform(transform)(picture, int(size))), tensor, name)


RUNNERS: dict[str, Callable[[Case], None]] = {"dataset": run_dataset, "transform": run_transform}
FUNCTIONS: dict[str, Callable[[Case], None]] = {}
