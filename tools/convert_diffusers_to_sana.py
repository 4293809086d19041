"""Turns a diffusers Sana folder into a Sana checkpoint or folder; the work is in `sana/models/pipeline_folder.py`.

Exit codes: 0 written, 1 the folder could not be read or converted, 2 wrong arguments.
"""

import argparse
import sys
from collections.abc import Sequence

from sana.models.pipeline_folder import import_pipeline
from sana.utils.logging import setup_logging


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(description="Convert a diffusers Sana folder into a Sana checkpoint.")
    add = parser.add_argument
    add("--diffusers_path", required=True, help="diffusers folder, or hub id owner/repository")
    add("--dump_path", required=True, help="file ending in .safetensors or .pth (state_dict), or a folder to write")
    add("--variant", help='which weight files to read, for example "bf16"; the default ones otherwise')
    add("--dtype", choices=("fp32", "fp16", "bf16"), help="dtype of the stored weights [as they are]")
    add(
        "--save_full_pipeline",
        action="store_true",
        help="also write vae/ and text_encoder/; --dump_path is a folder then",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the converter; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    setup_logging()
    if args.save_full_pipeline and args.dump_path.endswith((".pth", ".safetensors")):
        parser.error("--save_full_pipeline writes a folder, and --dump_path names a file")
    try:
        fresh = import_pipeline(
            args.diffusers_path,
            args.dump_path,
            variant=args.variant,
            dtype=args.dtype,
            full=args.save_full_pipeline,
        )
    except (RuntimeError, ValueError, OSError) as error:
        print(f"convert_diffusers_to_sana: {error}", file=sys.stderr)
        return 1
    print(f"{args.dump_path}: written" + (f"; re-initialised {', '.join(fresh)}" if fresh else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
