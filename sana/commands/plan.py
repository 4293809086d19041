"""Says what pictures or a training run need in memory, and which settings make them fit. Nothing is loaded or fetched.

sana plan                                         (the bundled model as the pipeline runs it here)
sana plan --config=configs/sana_config/4096ms/Sana_1600M_img4096_bf16.yaml --device=cuda --max_vram=8GB
sana plan --config=x.yaml --train --device=cuda --max_vram=32GB

Amounts of memory have a unit: MB and GB are 10^6 and 10^9 bytes, MiB and GiB 2^20 and 2^30.
Exit codes: 0 it fits, 1 failure (weights, disk), 2 wrong usage (options, config), 3 nothing fits into --max_vram.
"""

import argparse
import json

from sana.commands.parsing import flag, only_given, or_word, parse_with_overrides, truth


def build_parser(prog: str | None = None, description: str | None = None) -> argparse.ArgumentParser:
    """Returns the parser; an option that was not given is absent from its result."""
    parser = only_given(prog, description or __doc__)
    bool_flag = flag()
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
    add("--guidance", **bool_flag, help="classifier-free guidance (default: true; a Sprint model has none)")
    add("--pag", **bool_flag, help="perturbed-attention guidance (default: false)")
    add("--no_text_encoder", **bool_flag, help="every call brings its text embeddings")
    add("--binning", **bool_flag, help="make the nearest trained shape, then resize and crop (default: true)")
    add("--tiling", type=or_word(int, "auto", "none"), help="side of the decoder's tiles in pixels, none or auto")
    add("--offload", help="none, model, group, sequential or auto")
    add("--quantization", help="of the transformer: int8, int8-dynamic, int4, nf4, fp8, none or auto")
    add("--text_quantization", help="of the text encoder, as --quantization")
    add("--packing", type=or_word(truth, "auto"), metavar="BOOL", help="a CPU's copies of weights in its own layout")
    add("--split", **bool_flag, help="pictures may be made in several calls (default: true)")
    add("--upscale_from", type=int, metavar="SIDE", help="start from a small picture of about SIDE x SIDE pixels")
    add("--train", **bool_flag, help="plan the config's training run instead of pictures")
    add("--checkpointing", help="with --train: what is computed again, none, ffn, blocks or auto")
    add("--json", **bool_flag, help="print JSON, amounts in bytes")
    add("--debug", **bool_flag, help="tracebacks of errors")
    return parser


def main(arguments: list[str] | None = None, *, prog: str | None = None, description: str | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = build_parser(prog, description)
    given, rest = parse_with_overrides(parser, arguments)
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
