"""Captions images with a vision-language model and writes NAME_<VLM>.json beside each image (or shard).

    python tools/caption_images.py --model_path Qwen/Qwen2.5-VL-3B-Instruct folder
    python tools/caption_images.py --model_path models/blip --name BLIP --prompt "a picture of" folder shards

The file of an image `name.png` holds {"name": {"<VLM>": caption}}; that of a shard has an entry for every record. Train
with data.external_caption_suffixes: ["_<VLM>"]. What is there is not made again, so the tool may be killed at any time;
torchrun spreads the work. Exit codes: 0 done (unreadable images are named and left out); 1 the model, the data or the
disk failed, or there is no image; 2 wrong arguments.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from sana.data.caption_files import fill_side_files
from sana.data.sample import DataError
from sana.data.scan import scan
from sana.models.captioner.vlm import load_captioner
from sana.pipelines.command import run_command
from sana.utils.distributed import is_main_process, local_rank, world_size
from sana.utils.dtype import parse_dtype
from sana.utils.logging import setup_logging


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data_dir", nargs="+", help="folders of images, folders of tar shards, or .tar files")
    add("--model_path", required=True, help="image-text-to-text model of transformers: folder or hub id")
    add("--name", help="what files and entries call the model [last part of --model_path]")
    add(
        "--prompt",
        help="what a chat model is asked; for others, how each caption begins [a built-in question; nothing]",
    )
    add("--max_new_tokens", type=int, default=256, help="longest caption [256]")
    add("--batch_size", type=int, default=8, help="[8]")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="of the model [bf16 on a GPU, else fp32]")
    add("--device", help="for example cuda:1 or cpu [this process's GPU, else cpu]")
    add("--overwrite", action="store_true", help="make captions again that are there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code."""
    parser = build_parser()
    options = parser.parse_args(argv)
    name = options.name or Path(options.model_path.rstrip("/")).name
    if not name or "/" in name or name.endswith("_clip_score") or name == "prompt":
        parser.error(f"--name {name!r} cannot be part of a caption file's name")
    if options.batch_size < 1 or options.max_new_tokens < 1:
        parser.error("--batch_size and --max_new_tokens must be at least 1")
    setup_logging()
    return run_command(lambda: caption(options, name))


def caption(options: argparse.Namespace, name: str) -> None:
    """Loads the model and fills the files."""
    device = options.device or (f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu")
    captioner = load_captioner(
        options.model_path,
        dtype=parse_dtype(options.dtype or ("fp32" if device == "cpu" else "bf16")),
        device=device,
        instruction=options.prompt,
        max_new_tokens=options.max_new_tokens,
    )
    images = (item for item in scan(options.data_dir) if item.read is not None)
    summary = fill_side_files(
        tqdm(images, desc="captioning", unit=" images", disable=not is_main_process(), mininterval=1),
        lambda item: {f"_{name}": {name: ""}},
        lambda pictures, texts: [[text] for text in captioner.caption(pictures)],
        batch_size=options.batch_size,
        overwrite=options.overwrite,
    )
    if world_size() == 1 and not (summary.written or summary.present or summary.broken):
        raise DataError(f"There is no image in {', '.join(options.data_dir)}.")
    print(f"{summary.written} images captioned, {summary.present} were complete, {summary.broken} cannot be read")


if __name__ == "__main__":
    raise SystemExit(main())
