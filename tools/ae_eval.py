"""Measures an autoencoder: PSNR, SSIM and, with an Inception file, rFID, over a folder of images or drawn scenes.

    python tools/ae_eval.py --vae asset/models/sana_tiny --scenes 64
    python tools/ae_eval.py --vae hf://owner/repo/vae --data_dir my_photographs --image_size 512 \\
        --fid_weights pt_inception-2015-12-05-6726825d.pth --json scores.json --csv images.csv

PSNR and SSIM are means over images, decoded images being clamped to [-1, 1]. Exit codes: 0 done, 1 failure (weights,
images, numbers), 2 wrong usage.
"""

import argparse
import csv
import itertools
import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sana.data.sample import BrokenSampleError
from sana.models.autoencoder.loading import load_autoencoder
from sana.pipelines.command import run_command
from sana.training.ae_metrics import AutoencoderScores, evaluate_autoencoder
from sana.training.dcae_data import ImageFiles, crops
from sana.training.inception import InceptionFeatures
from sana.utils.dtype import parse_dtype
from sana.utils.logging import setup_logging

MODELS = Path(__file__).resolve().parent.parent / "asset/models"
NOT_COMPUTED = "not computed (give --fid_weights)"
FEW = 2048  # fewer images than features: the covariance is singular, and the distance biased upwards


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--vae", required=True, help="folder, hub id, hf://owner/repo/folder, or the name of a bundled model")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data_dir", nargs="+", help="folders of images (captions are not needed)")
    source.add_argument("--scenes", type=int, metavar="N", help="so many drawn scenes of 256 pixels")
    add("--image_size", type=int, default=256, help="of folder images: shorter side scaled, middle cut (default: 256)")
    add("--limit", type=int, help="at most so many images of the folders, in their order")
    add("--seed", type=int, default=10**6, help="of the drawn scenes (default: 1000000, which training does not reach)")
    add("--batch_size", type=int, default=8)
    add("--fid_weights", type=Path, help="Inception-v3 file: pytorch-fid's (published FIDs) or torchvision's")
    add("--dtype", default="fp32", help="fp32, bf16 or fp16 (default: fp32)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--json", type=Path, help="also write the scores here")
    add("--csv", type=Path, help="also write key, psnr and ssim of every image here")
    return parser


def scene_batches(count: int, seed: int, batch_size: int) -> Iterator[tuple[list[str], Tensor]]:
    """Drawn scenes; eight share a seed, so the batch size changes none of them."""
    scenes = (image for start in range(0, count, 8) for image in crops(seed + start, 8, whole=True))
    for start in range(0, count, batch_size):
        images = torch.stack(list(itertools.islice(scenes, min(batch_size, count - start))))
        yield [f"scene_{start + index:05d}" for index in range(len(images))], images


def folder_batches(
    files: ImageFiles, count: int, batch_size: int, broken: list[str]
) -> Iterator[tuple[list[str], Tensor]]:
    """Images of folders; the keys of unreadable ones are added to `broken`."""
    batch: list[tuple[str, Tensor]] = []
    for index in range(count):
        try:
            batch.append((files.key(index), files.load(index, random.Random(0)).image))
        except BrokenSampleError as error:
            sys.stderr.write(f"left out: {error}\n")
            broken.append(error.key)
        if batch and (len(batch) == batch_size or index == count - 1):
            yield [key for key, _ in batch], torch.stack([image for _, image in batch])
            batch = []


def report(
    options: argparse.Namespace, scores: AutoencoderScores, broken: list[str], kind: str | None
) -> dict[str, Any]:
    """What is shown and written; a number that is infinite (equal images) is None."""
    return {
        "vae": options.vae,
        "data": [str(one) for one in options.data_dir] if options.data_dir else f"{options.scenes} drawn scenes",
        "images": len(scores.rows),
        "left_out": broken,
        "psnr": scores.psnr if math.isfinite(scores.psnr) else None,
        "ssim": scores.ssim,
        "latent_std": scores.latent_std,
        "rfid": NOT_COMPUTED if scores.rfid is None else scores.rfid,
        "rfid_features": kind,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    for name in ("scenes", "image_size", "limit", "batch_size"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(options, name)}")

    def work() -> None:
        setup_logging()
        result, rows = evaluate(options)
        for name in ("images", "psnr", "ssim", "latent_std", "rfid", "rfid_features"):
            value = result[name]
            if value is not None or name == "psnr":
                print(f"{name:14s} {value:.4f}" if isinstance(value, float) else f"{name:14s} {value or 'infinite'}")
        if options.json:
            options.json.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        if options.csv:
            with options.csv.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, ("key", "psnr", "ssim"))
                writer.writeheader()
                writer.writerows(rows)

    return run_command(work)


def evaluate(options: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Loads what the options name and measures; returns the report and the row of every image.

    Raises:
        CheckpointError, DataError: weights or images that are not there.
    """
    named = MODELS / options.vae / "vae"
    ref = named if not Path(options.vae).exists() and named.is_dir() else options.vae
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    autoencoder = load_autoencoder(ref, dtype=parse_dtype(options.dtype), device=device, sample_posterior=False)
    extractor = InceptionFeatures(options.fid_weights).to(device) if options.fid_weights else None
    broken: list[str] = []
    if options.scenes:
        count, batches = options.scenes, scene_batches(options.scenes, options.seed, options.batch_size)
    else:
        if options.image_size % autoencoder.downsample_factor:
            raise ValueError(f"--image_size must be a multiple of {autoencoder.downsample_factor} for this autoencoder")
        files = ImageFiles(options.data_dir, options.image_size)
        count = min(len(files), options.limit or len(files))
        batches = folder_batches(files, count, options.batch_size, broken)
    with tqdm(total=count, desc="measuring", unit="image") as bar:

        def counted() -> Iterator[tuple[list[str], Tensor]]:
            for keys, images in batches:
                yield keys, images
                bar.update(len(keys))

        scores = evaluate_autoencoder(autoencoder, counted(), extractor)
    if extractor is not None and len(scores.rows) <= FEW:
        sys.stderr.write(f"rFID over {len(scores.rows)} images is biased: use several times {FEW}, usually 50000\n")
    return report(options, scores, broken, extractor.kind if extractor else None), scores.rows


if __name__ == "__main__":
    raise SystemExit(main())
