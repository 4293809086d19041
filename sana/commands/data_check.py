"""Lists what would spoil training in folders of images or tar shards: a table, and JSON with --json.

    sana data check asset/example_data
    sana data check shards --type SanaWebDatasetMS --config CONFIG.yaml --json report.json
    sana data check asset/example_data --json                        (the report on standard output, no table)

Found are: unreadable images, images without a caption, captions without an image, damaged caption files, duplicates,
buckets with fewer images than a batch, over-long captions. Exit codes: 0 clean; 1 problems, or no image at all; 2 wrong
arguments. Nothing is changed.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from sana.commands.parsing import new_parser
from sana.data.aspect_ratio import ASPECT_RATIOS
from sana.pipelines.command import run_command
from sana.utils.logging import setup_logging

TYPES = {"SanaImgDataset": "folder", "SanaWebDataset": "shards", "SanaWebDatasetMS": "shards"}
WORDS = 200  # of a caption, about 300 tokens


def build_parser(prog: str | None = None, description: str | None = None) -> argparse.ArgumentParser:
    """The arguments."""
    parser = new_parser(prog, description or __doc__)
    add = parser.add_argument
    add("data_dir", nargs="*", help="folders of images, folders of tar shards, .tar files [--config's data.data_dir]")
    add("--type", choices=TYPES, help="what the folders hold [seen by itself: shards where there are .tar files]")
    add("--config", help="YAML of the training run: sizes, buckets, batch, caption length and tokenizer")
    add("--image_size", type=int, help="side of the images in training, in pixels [--config's, else 512]")
    add("--aspect_ratio_type", choices=ASPECT_RATIOS, help="count the buckets of this table [--config's, else none]")
    add("--batch_size", type=int, help="a bucket with fewer images is starved [--config's, else 1]")
    add("--max_words", type=int, help=f"longest caption in words [{WORDS}; --config's tokenizer counts tokens instead]")
    add("--tokenizer", type=Path, help="tokenizer.json, or a folder with one [--config's text encoder, if it is here]")
    add("--json", nargs="?", const="-", metavar="FILE", help="the whole report to a file, or instead of the table")
    add("--threads", type=int, default=os.cpu_count() or 1, help="that decode images [one for each core]")
    return parser


def main(argv: Sequence[str] | None = None, *, prog: str | None = None, description: str | None = None) -> int:
    """Runs the tool; returns the exit code."""
    parser = build_parser(prog, description)
    options = parser.parse_args(argv)
    for name in ("image_size", "batch_size", "max_words", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if not options.data_dir and not options.config:
        parser.error("name the folders to check, or a --config with data.data_dir")
    setup_logging()
    from sana.commands.data_check_work import check

    return run_command(lambda: check(options))
