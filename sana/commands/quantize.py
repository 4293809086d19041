"""Makes a model folder with quantised weights; `SanaPipeline.from_pretrained` and --model_path load it as it is.

    sana quantize --model_path asset/models/sana_tiny --scheme int8 --output output/sana_tiny_int8
    sana quantize --config=configs/... --model_path=hf://... --scheme nf4 --text_encoder nf4 --output DIR

Schemes: int8 (8-bit weights), int8-dynamic (8-bit weights and inputs), nf4 (4-bit, bitsandbytes), int4 (4-bit, needs a
CUDA device), fp8 (needs a Hopper GPU). The exact network is never in memory as a whole. Exit code 2: wrong arguments;
1: the model could not be read, or the folder not written.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from sana.commands.parsing import SCHEMES, add_json, new_parser, show
from sana.pipelines.command import run_command
from sana.utils.logging import setup_logging


def build_parser(prog: str | None = None, description: str | None = None) -> argparse.ArgumentParser:
    """The arguments."""
    parser = new_parser(prog, description or __doc__)
    add = parser.add_argument
    add("--model_path", required=True, help="model folder, weight file, hf:// reference or hub id")
    add("--config", help="YAML of weights that do not say what they are")
    add("--scheme", choices=SCHEMES, help="of the transformer")
    add("--text_encoder", choices=SCHEMES, help="scheme of the text encoder; without it, it is copied as it is")
    add("--keep", nargs="+", default=[], metavar="PATTERN", help='layers that stay exact, e.g. "blocks.0.*"')
    add("--output", required=True, type=Path, help="folder to write; must not exist")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="of what stays exact, and of weights before [the config's]")
    add("--device", help="where weights are packed; int4 and fp8 need their GPU [cpu]", default="cpu")
    add_json(parser)
    return parser


def main(argv: Sequence[str] | None = None, *, prog: str | None = None, description: str | None = None) -> int:
    """Runs the tool; returns the exit code."""
    parser = build_parser(prog, description)
    args = parser.parse_args(argv)
    setup_logging()
    if not (args.scheme or args.text_encoder):
        parser.error("give --scheme, --text_encoder or both")
    return run_command(lambda: convert(args))


def convert(args: argparse.Namespace) -> None:
    """Loads the model quantised and writes it."""
    from sana.pipelines import loading
    from sana.pipelines.quantized_folder import save_quantized
    from sana.pipelines.sana_pipeline import SanaPipeline

    if args.output.exists():
        raise ValueError(f"{args.output} exists already; name a folder that does not, or remove it.")
    source = loading.find_model(args.model_path)
    config = loading.as_config(args.config) if args.config else loading.source_config(source)
    pipeline = SanaPipeline(config, device=args.device, dtype=args.dtype or config.model.mixed_precision)
    pipeline.quantize(args.scheme, args.text_encoder, keep=args.keep).from_pretrained(args.model_path)
    if args.text_encoder:
        _ = pipeline.text_encoder  # loaded when first asked for
    save_quantized(pipeline, source, args.output)
    size = sum(file.stat().st_size for file in args.output.rglob("*") if file.is_file())
    result = {"path": str(args.output), "bytes": size}
    show(result, f"{args.output}: written, {size / 2**20:.1f} MiB", as_json=args.json)
