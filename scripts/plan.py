"""Says what pictures or a training run need in memory, and which settings make them fit. Nothing is loaded or fetched.

python scripts/plan.py                                         (the bundled model as the pipeline runs it here)
python scripts/plan.py --config=configs/sana_config/4096ms/Sana_1600M_img4096_bf16.yaml --device=cuda --max_vram=8GB
python scripts/plan.py --config=x.yaml --train --device=cuda --max_vram=32GB

Amounts of memory have a unit: MB and GB are 10^6 and 10^9 bytes, MiB and GiB 2^20 and 2^30.
Exit codes: 0 it fits, 1 failure (weights, disk), 2 wrong usage (options, config), 3 nothing fits into --max_vram.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from typing import Any

OVERRIDE = re.compile(r"--[A-Za-z_]\w*(\.\w+)+=.*", re.DOTALL)


def truth(text: str) -> bool:
    """Reads a yes or no of the command line."""
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")
    return text.lower() in ("true", "1", "yes")


def or_word(read: Callable[[str], Any], *words: str) -> Callable[[str], Any]:
    """Returns a reader of what `read` reads, or of one of some words."""

    def reader(text: str) -> Any:
        if text in words:
            return text
        try:
            return read(text)
        except (ValueError, argparse.ArgumentTypeError):
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; see --help") from None

    return reader


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser; an option that was not given is absent from its result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    flag = {"type": truth, "nargs": "?", "const": True, "metavar": "BOOL"}
    add = parser.add_argument
    add("--config", help="YAML of the model; not needed where the weights say what they are")
    add("--model_path", help="local weights that say what they are (default: asset/models/sana_tiny)")
    add("--height", type=int, help="of a picture, in pixels (default: the model's own size)")
    add("--width", type=int, help="of a picture, in pixels (default: the model's own size)")
    add("--batch", type=int, help="pictures that are wanted (default: 1); with --train: images of a micro-batch")
    add("--device", help="cpu or cuda, which need not be there (default: cuda where there is one)")
    add("--dtype", help="fp32, bf16 or fp16 (default: fp32 on a CPU, else the config's)")
    add("--max_vram", help="what may be allocated on the device, such as 8GB; settings left open are chosen to fit")
    add("--margin", help="keep so much of max_vram free (default: nothing)")
    add("--guidance", **flag, help="classifier-free guidance (default: true; a Sprint model has none)")
    add("--pag", **flag, help="perturbed-attention guidance (default: false)")
    add("--no_text_encoder", **flag, help="every call brings its text embeddings")
    add("--binning", **flag, help="make the nearest trained shape, then resize and crop (default: true)")
    add("--tiling", type=or_word(int, "auto", "none"), help="side of the decoder's tiles in pixels, none or auto")
    add("--offload", help="none, model, group, sequential or auto")
    add("--quantization", help="of the transformer: int8, int8-dynamic, int4, nf4, fp8, none or auto")
    add("--text_quantization", help="of the text encoder, as --quantization")
    add("--packing", type=or_word(truth, "auto"), metavar="BOOL", help="a CPU's copies of weights in its own layout")
    add("--split", **flag, help="pictures may be made in several calls (default: true)")
    add("--train", **flag, help="plan the config's training run instead of pictures")
    add("--checkpointing", help="with --train: what is computed again, none, ffn, blocks or auto")
    add("--json", **flag, help="print JSON, amounts in bytes")
    add("--debug", **flag, help="tracebacks of errors")
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = build_parser()
    known, rest = parser.parse_known_args(arguments)
    strangers = [one for one in rest if not OVERRIDE.fullmatch(one)]
    if strangers:
        parser.error(f"unknown argument {strangers[0]} (a config override is written --section.key=value)")
    given = vars(known)
    as_json, debug = given.pop("json", False), given.pop("debug", False)

    from sana.pipelines.command import run_command

    def work() -> None:
        from sana.pipelines.plan_options import plan_command
        from sana.pipelines.plan_search import MemoryLimitError

        try:
            report = plan_command(given, rest)
        except MemoryLimitError as error:
            if as_json:
                print(json.dumps(error.as_dict(), indent=2))
            raise
        print(json.dumps(report.as_dict(), indent=2) if as_json else report)

    return run_command(work, debug=debug)


if __name__ == "__main__":
    sys.exit(main())
