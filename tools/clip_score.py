"""Scores the captions of images by CLIP and writes NAME_<VLM>_clip_score.json beside each image (or shard).

    python tools/clip_score.py --model_path openai/clip-vit-large-patch14 folder
    python tools/clip_score.py --model_path models/clip --captions prompt,Qwen2.5-VL-3B-Instruct folder

The score is 100 * max(cosine, 0) of CLIP's image and text embeddings. The file of `name.png` holds
{"name": {"<VLM>": "27.1037"}}; the captions of `name.txt` are scored in `name_prompt_clip_score.json`. Train with
data.external_clipscore_suffixes: ["_<VLM>_clip_score", "_prompt_clip_score"]. What is there is not made again, so the
tool may be killed at any time (use --overwrite after captions changed); torchrun spreads the work. Exit codes: 0 done
(unreadable images are named and left out); 1 the model, the data or the disk failed, or there is no caption; 2 wrong
arguments.
"""

import argparse
from collections.abc import Sequence

import torch
from tqdm import tqdm

from sana.data.caption_files import Wanted, fill_side_files
from sana.data.sample import DataError
from sana.data.scan import Found, scan
from sana.models.captioner.clip import load_clip
from sana.pipelines.command import run_command
from sana.utils.distributed import is_main_process, local_rank, world_size
from sana.utils.dtype import parse_dtype
from sana.utils.logging import setup_logging


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data_dir", nargs="+", help="folders of images, folders of tar shards, or .tar files")
    add("--model_path", required=True, help="CLIP model of transformers: folder or hub id")
    add("--captions", help="score only these, separated by commas: names of captioners, prompt [all]")
    add("--batch_size", type=int, default=32, help="[32]")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the model [fp32]")
    add("--device", help="for example cuda:1 or cpu [this process's GPU, else cpu]")
    add("--overwrite", action="store_true", help="score captions again that have a score")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.batch_size < 1:
        parser.error("--batch_size must be at least 1")
    setup_logging()
    return run_command(lambda: score(options))


def wanted_scores(item: Found, chosen: Sequence[str]) -> Wanted:
    """The score files of an image: one for each file of captions."""
    wanted: Wanted = {}
    for captioner, text in item.captions.items():
        if not chosen or captioner in chosen:
            wanted.setdefault(f"{item.endings[captioner]}_clip_score", {})[captioner] = text
    return wanted


def score(options: argparse.Namespace) -> None:
    """Loads the model and fills the files."""
    device = options.device or (f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu")
    scorer = load_clip(options.model_path, dtype=parse_dtype(options.dtype), device=device)
    chosen = [name for name in (options.captions or "").split(",") if name]
    images = (item for item in scan(options.data_dir) if item.read is not None and wanted_scores(item, chosen))
    summary = fill_side_files(
        tqdm(images, desc="scoring", unit=" images", disable=not is_main_process(), mininterval=1),
        lambda item: wanted_scores(item, chosen),
        lambda pictures, texts: [[f"{value:.4f}" for value in row] for row in scorer.score(pictures, texts)],
        batch_size=options.batch_size,
        overwrite=options.overwrite,
    )
    if world_size() == 1 and not (summary.written or summary.present or summary.broken):
        raise DataError(f"There is no image with such a caption in {', '.join(options.data_dir)}.")
    print(f"{summary.written} images scored, {summary.present} were complete, {summary.broken} cannot be read")


if __name__ == "__main__":
    raise SystemExit(main())
