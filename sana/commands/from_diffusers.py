"""Turns a diffusers Sana folder into a Sana checkpoint or folder.

    sana convert from-diffusers --diffusers_path=DIFFUSERS_FOLDER --dump_path=weights.safetensors
    sana convert from-diffusers --diffusers_path=OWNER/REPOSITORY --dump_path=FOLDER --save_full_pipeline

Exit codes: 0 written, 1 the folder could not be read or converted, 2 wrong arguments.
"""

import argparse
import sys
from collections.abc import Sequence

from sana.commands.parsing import add_json, new_parser, show
from sana.utils.logging import setup_logging


def build_parser(prog: str | None = None, description: str | None = None) -> argparse.ArgumentParser:
    """The arguments."""
    parser = new_parser(prog, description or __doc__)
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
    add_json(parser)
    return parser


def main(argv: Sequence[str] | None = None, *, prog: str | None = None, description: str | None = None) -> int:
    """Runs the converter; returns the exit code."""
    parser = build_parser(prog, description)
    args = parser.parse_args(argv)
    setup_logging()
    if args.save_full_pipeline and args.dump_path.endswith((".pth", ".safetensors")):
        parser.error("--save_full_pipeline writes a folder, and --dump_path names a file")
    from sana.models.pipeline_folder import import_pipeline

    try:
        fresh = import_pipeline(
            args.diffusers_path,
            args.dump_path,
            variant=args.variant,
            dtype=args.dtype,
            full=args.save_full_pipeline,
        )
    except (RuntimeError, ValueError, OSError) as error:
        print(f"{parser.prog.removesuffix('.py')}: {error}", file=sys.stderr)
        return 1
    text = f"{args.dump_path}: written" + (f"; re-initialised {', '.join(fresh)}" if fresh else "")
    show({"path": args.dump_path, "reinitialised": list(fresh)}, text, as_json=args.json)
    return 0
