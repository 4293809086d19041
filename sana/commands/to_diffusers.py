"""Writes a Sana checkpoint in the layout of diffusers.

    sana convert to-diffusers --orig_ckpt_path=asset/models/sana_tiny --save_full_pipeline --dump_path=FOLDER
    sana convert to-diffusers --model_type=SanaMS_600M_P1_D28 --image_size=512 --dump_path=FOLDER --dtype=fp16

Exit codes: 0 written, 1 the weights could not be read or converted, 2 wrong arguments.
"""

import argparse
import sys
from collections.abc import Sequence

from sana.commands.parsing import add_json, new_parser, show
from sana.models.diffusers_names import MODEL_TYPES, SCHEDULERS
from sana.utils.logging import setup_logging


def build_parser(prog: str | None = None, description: str | None = None) -> argparse.ArgumentParser:
    """The arguments; the official converter's keep their names and defaults."""
    parser = new_parser(prog, description or __doc__)
    add = parser.add_argument
    add("--orig_ckpt_path", help="checkpoint: path, hf://owner/repo/file, URL, or our model folder [the released one]")
    add("--image_size", type=int, choices=(512, 1024, 2048, 4096), help="image size the model was made for [1024]")
    add("--model_type", choices=MODEL_TYPES, help="architecture, when the file does not say it [SanaMS_1600M_P1_D20]")
    add("--scheduler_type", choices=SCHEDULERS, help="scheduler of the folder [flow-dpm_solver; scm for SanaSprint]")
    add("--dump_path", required=True, help="folder to write")
    add(
        "--save_full_pipeline", action="store_true", help="also write vae, text encoder, tokenizer and model_index.json"
    )
    add("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="dtype of the stored weights [fp32]")
    add("--config", help="YAML of the model, in place of --model_type and --image_size")
    add("--variant", help='suffix of the weight files, for example "bf16"; none by default')
    add("--ema", action="store_true", help="take state_dict_ema of a training checkpoint")
    add("--flow_shift", type=float, help="shift of the schedule [what the checkpoint or config says, else 3.0]")
    add("--vae", help="autoencoder: folder or hub id [the model folder's, the config's, or DC-AE sana-1.1]")
    add(
        "--text_encoder",
        help="text encoder: folder, name or hub id [the model folder's, the config's, or gemma-2-2b-it]",
    )
    add_json(parser)
    return parser


def main(argv: Sequence[str] | None = None, *, prog: str | None = None, description: str | None = None) -> int:
    """Runs the converter; returns the exit code."""
    parser = build_parser(prog, description)
    args = parser.parse_args(argv)
    setup_logging()
    if args.config and (args.model_type or args.image_size):
        parser.error("--config says the architecture: leave out --model_type and --image_size")
    from sana.commands.to_diffusers_work import convert

    try:
        pipeline = convert(args)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"{parser.prog.removesuffix('.py')}: {error}", file=sys.stderr)
        return 1
    text = (
        f"{args.dump_path}: written; it loads with diffusers.{pipeline}.from_pretrained"
        if args.save_full_pipeline
        else f"{args.dump_path}/transformer: written"
    )
    show({"path": args.dump_path, "full_pipeline": args.save_full_pipeline}, text, as_json=args.json)
    return 0
