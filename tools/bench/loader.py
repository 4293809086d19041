"""Images a second that one core reads: photographs from files, and cached features. Worker processes multiply this."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from sana.data.aspect_ratio import ASPECT_RATIOS, closest_ratio
from sana.data.feature_cache import image_hash
from sana.data.feature_writer import FeatureWriter
from sana.data.image_folder import SanaImgDataset
from sana.data.transforms import normalise_images
from tools.bench.harness import Case, Check, Comparison, Side, Work, compare
from tools.bench.results import OURS
from tools.bench.setting import Setting

TABLE = "ASPECT_RATIO_1024"
PIXEL_TOLERANCE = 2e-2  # the fast way of scaling differs by at most two of 255 levels
TEXT_TOKENS, TEXT_WIDTH = 60, 2304
IDENTITIES = {"latents": {"autoencoder": "benchmark"}, "text": {"text_encoder": "benchmark"}}


def cases(setting: Setting) -> list[Case]:
    """Files and features."""
    quick = setting.suite == "quick"
    count, width, height = (2, 320, 240) if quick else (16, 1600, 1200)
    title = f"{count} JPEG files of {width} x {height}, to 1024 px buckets, one core"
    photographs = partial(photograph_comparison, setting.folder, count, width, height)
    features = partial(feature_comparison, setting.folder, 8 if quick else 128)
    return [
        Case("loader", title, photographs, 3.0, 60.0),
        Case("loader", "cached latents and text features (60 tokens) of 1024 px images, one core", features, 3.0, 60.0),
    ]


class OneCore:
    """Runs a reader with a single thread, as worker processes do.

    Args:
        read: the work.
    """

    def __init__(self, read: Callable[[], Tensor]) -> None:
        self._read = read

    def __call__(self) -> Tensor:
        """What was read last."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self._read()
        finally:
            torch.set_num_threads(threads)


def draw_photographs(folder: Path, count: int, width: int, height: int) -> Path:
    """Writes JPEG files with captions: smooth colours and fine noise, which cost as much to decode as photographs."""
    target = folder / f"photographs_{width}"
    target.mkdir(exist_ok=True)
    draw = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        noisy = np.asarray(coarse, dtype=np.int16) + draw.normal(0, 8, (height, width, 3)).astype(np.int16)
        picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        picture.save(target / f"{number:03d}.jpg", quality=92)
        (target / f"{number:03d}.txt").write_text(f"picture number {number}", encoding="utf-8")
    return target


def photograph_comparison(folder: Path, count: int, width: int, height: int) -> Comparison:
    """Our data set both ways, and PIL with torchvision's transforms as the official code has it."""
    source = draw_photographs(folder, count, width, height)
    ours = {
        f"{OURS} ({resize})": SanaImgDataset(
            data_dir=source, multi_scale=True, aspect_ratio_type=TABLE, sort_dataset=True, resize=resize
        )
        for resize in ("fast", "exact")
    }
    files = sorted(source.glob("*.jpg"))
    readers = {name: OneCore(partial(_read_all, dataset)) for name, dataset in ours.items()}
    readers["PIL, official transforms"] = OneCore(lambda: [read_officially(file) for file in files][-1])

    def check() -> dict[str, Check]:
        first, *others = (normalise_images(read()) for read in readers.values())
        return {
            name: compare(first, other, tolerance=PIXEL_TOLERANCE)
            for name, other in zip(list(readers)[1:], others, strict=True)
        }

    sides = [Side(name, read) for name, read in readers.items()]
    return Comparison(sides, check, work=Work(images=count), facts={"files": count, "size": [width, height]})


def feature_comparison(folder: Path, count: int) -> Comparison:
    """Our data set with cached features. There is nothing to compare it with: what is read must be what was written."""
    source = draw_photographs(folder, count, 64, 64)
    dataset = partial(SanaImgDataset, data_dir=source, image_size=1024, sort_dataset=True)
    plain = dataset()
    latents, text = torch.randn(32, 32, 32), torch.randn(TEXT_TOKENS, TEXT_WIDTH)
    target = folder / "features"
    with FeatureWriter(target, IDENTITIES) as writer:
        for index in range(len(plain)):
            key, caption = plain.key(index), plain.captions(index)[0]
            writer.add_latents(key, image_hash(plain.image_bytes(index)), plain.buckets()[index], latents + index)
            writer.add_text(caption, text, torch.ones(TEXT_TOKENS))
            writer.add_captions(key, [caption])
            writer.end_sample()
    cached = dataset(load_vae_feat=True, load_text_feat=True, feature_dir=target)
    read = OneCore(partial(_read_all, cached))

    def check() -> dict[str, Check]:
        return {"what was written": compare(read(), latents + len(plain) - 1, tolerance=1e-3)}

    return Comparison([Side(OURS, read)], check, work=Work(images=count), facts={"text_tokens": TEXT_TOKENS})


def read_officially(file: Path) -> Tensor:
    """PIL, then torchvision's resize, centre crop, tensor and normalisation."""
    picture = Image.open(file).convert("RGB")
    table = ASPECT_RATIOS[TABLE]
    height, width = (int(size) for size in table[closest_ratio(picture.height, picture.width, table)])
    if height / picture.height > width / picture.width:
        covering = (height, int(picture.width * height / picture.height))
    else:
        covering = (int(picture.height * width / picture.width), width)
    steps = [
        transforms.Resize(covering, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop((height, width)),
        transforms.ToTensor(), transforms.Normalize([0.5], [0.5]),
    ]  # fmt: skip
    result: Tensor = transforms.Compose(steps)(picture)
    return result


def _read_all(dataset: SanaImgDataset) -> Tensor:
    """Reads every sample; returns the picture or the latents of the last."""
    samples = [dataset.load(index, random.Random(0)) for index in range(len(dataset))]
    last = samples[-1]
    found = last.image if last.image is not None else last.latents
    assert found is not None
    return found
