"""Packs a folder of captioned images into tar shards for SanaWebDatasetMS; the work is in `sana/data/shard_writer.py`.

    python tools/convert_ImgDataset_to_WebDatasetMS_format.py          # asset/example_data -> asset/example_data_tar
    python tools/convert_ImgDataset_to_WebDatasetMS_format.py --input data/photos --output data/photos_tar

A run that was killed goes on when it is started again. Only without any argument on a terminal does it ask.
Exit codes: 0 written or already there, 1 the data cannot be packed or written, 2 wrong arguments.
"""
# ruff: noqa: N999 - the official name

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from sana.data.captions import CAPTION_LINES
from sana.data.sample import DataError
from sana.data.shard_writer import PackSummary, pack_folder
from sana.utils.logging import setup_logging

ROOT = Path(__file__).resolve().parents[1]
NAME = "convert_ImgDataset_to_WebDatasetMS_format"


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", type=Path, help="folder of name.png|jpg|jpeg|webp with name.txt [asset/example_data]")
    add("--output", type=Path, help="folder for the shards [the input's name with _tar at the end]")
    add("--shard_size", type=int, default=10_000, help="most images in a shard [10000]")
    add("--max_bytes", type=int, default=1 << 30, help="most bytes in a shard [1073741824]")
    add("--caption_lines", choices=CAPTION_LINES, default="all", help="what of a text file is the caption [all]")
    add("--overwrite", action="store_true", help="replace shards of another data set in the output folder")
    add("--skip_broken", action="store_true", help="leave unreadable images out instead of stopping")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the converter; returns the exit code."""
    parser = build_parser()
    given = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(given)
    for name in ("shard_size", "max_bytes"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    setup_logging()
    source = args.input or ROOT / "asset/example_data"
    if not given and sys.stdin.isatty():
        source = _ask("folder with images and captions", source)
    output = args.output or source.with_name(f"{source.absolute().name}_tar")
    if not given and sys.stdin.isatty():
        output = _ask("folder for the shards", output)
    try:
        summary = _pack(source, output, args)
    except (DataError, OSError) as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 1
    for reason in summary.broken:
        print(f"{NAME}: left out {reason}", file=sys.stderr)
    kept = f", {summary.kept} of them there already" if summary.kept else ""
    print(f"{output}: {summary.records} images in {summary.shards} shards{kept}")
    return 0


def _pack(source: Path, output: Path, args: argparse.Namespace) -> PackSummary:
    with tqdm(desc="packing", unit="image", mininterval=1) as bar:
        return pack_folder(
            source,
            output,
            shard_size=args.shard_size,
            max_bytes=args.max_bytes,
            caption_lines=args.caption_lines,
            overwrite=args.overwrite,
            skip_broken=args.skip_broken,
            on_start=bar.reset,
            on_record=bar.update,
        )


def _ask(what: str, default: Path) -> Path:
    answer = input(f"{what} [{default}]: ").strip()
    return Path(answer) if answer else default


if __name__ == "__main__":
    sys.exit(main())
