"""Makes pictures of a list of prompts.

python scripts/inference.py                                    (the bundled model, asset/samples_mini.txt)
python scripts/inference.py --config=x.yaml --model_path=hf://owner/repo/weights.pth --txt_file=prompts.txt

Pictures that are already there by the very same recipe are skipped, so a stopped run goes on when it is started again.
Exit codes: 0 done, 1 failure (weights, network, disk, numbers), 2 wrong usage (options, prompt file, config),
3 nothing was loaded, because the pictures do not fit into --max_vram.
"""

import argparse
import time

from sana.commands.parsing import flag, numbers, only_given, parse_with_overrides, tiles


def build_parser(prog: str | None = None, description: str | None = None) -> argparse.ArgumentParser:
    """Returns the parser; an option that was not given is absent from its result."""
    parser = only_given(prog, description or __doc__)
    add_options(parser)
    return parser


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of making pictures."""
    bool_flag = flag()
    add = parser.add_argument
    add("--config", help="YAML of the model; not needed where the weights say what they are")
    add("--model_path", help="weights: path, hf://owner/repo/path, hub id or URL (default: asset/models/sana_tiny)")
    add("--txt_file", help="prompts, one a line, with --ar 1:2 or --hw 512:1024 (default: asset/samples_mini.txt)")
    add("--json_file", help='{"id": {"prompt": ..., "seed": ..., "height": ..., "width": ..., "negative_prompt": ...}}')
    add("--work_dir", help="folder of the pictures (default: output/inference/<model>)")
    add("--version", help="accepted as in the released script; has no effect")
    add("--sample_nums", type=int, help="use only so many prompts of the list")
    add("--bs", type=int, help="pictures in one call of the transformer; changes no picture (default: 1)")
    add("--cfg_scale", type=float, help="classifier-free guidance; 1 is off (default: 4.5)")
    add("--pag_scale", type=float, help="perturbed-attention guidance; 1 is off (default: 1)")
    add("--sampling_algo", help="flow_dpm-solver, flow_euler, dpm-solver, sa-solver, scm (default: the config's)")
    add("--seed", type=int, help="prompt i of the list uses seed + i (default: 0)")
    add("--dataset", help="name of the prompt set, becomes a folder (default: custom, no folder)")
    add("--step", type=int, help="sampling steps; -1 for the sampler's default")
    add("--add_label", help="word for the folder's name")
    add("--tar_and_del", **bool_flag, help="pack the pictures into a .tar and delete them")
    add("--exist_time_prefix", help="first word of the folder's name")
    add("--gpu_id", type=int, help="number of the GPU; under a launcher each process takes its own")
    add("--custom_image_size", type=int, help="side of square pictures, in pixels")
    add("--start_index", type=int, help="first prompt to do (default: 0)")
    add("--end_index", type=int, help="one past the last prompt to do (default: 30000)")
    add("--interval_guidance", type=numbers, metavar="[LOW,HIGH]", help="guidance between these sigmas only")
    add("--ablation_selections", type=numbers, metavar="[A,B,...]", help="repeat everything with these values ...")
    add("--ablation_key", help="... of this option: cfg_scale, pag_scale, step or seed")
    add("--debug", **bool_flag, help="only two prompts, and tracebacks of errors")
    add("--if_save_dirname", **bool_flag, help="write the folder's name to dirname.txt beside it")
    add("--dtype", help="fp32, bf16 or fp16 (default: fp32 on a CPU, else the config's)")
    add("--device", help="cpu, cuda, cuda:1 or mps (default: cuda where there is one)")
    add(
        "--use_resolution_binning",
        **bool_flag,
        help="make the nearest trained shape, resize and crop it (default: true)",
    )
    add("--upscale_from", type=int, metavar="SIDE", help="start from a small picture of about SIDE x SIDE pixels")
    add("--upscale_strength", type=float, help="noise in (0, 1) at which the large one starts; less keeps more")
    add("--step_cache", type=float, help="approximation: steps reuse a prediction; about 0.1 to 0.3 (default: 0, off)")
    add("--max_text_tokens", type=int, help="approximation: only the first so many tokens of a prompt are read")
    add = parser.add_argument_group("memory and speed").add_argument
    add("--max_vram", metavar="8GB", help="plan tiles, offload, weights and calls; exit code 3 where nothing fits")
    add("--quantization", metavar="SCHEME", help="of the transformer: none, int8, int8-dynamic, int4, nf4 or fp8")
    add("--text_quantization", metavar="SCHEME", help="of the text encoder, by the same names")
    add("--offload", help="where weights wait on the CPU: none, model, group or sequential; the same pictures")
    add(
        "--vae_tiling", **bool_flag | {"type": tiles, "metavar": "SIDE"}, help="decode in tiles (of SIDE pixels); exact"
    )
    add("--compile", help="off, regional, graph or max; the last two need a CUDA GPU (default: off)")


def main(arguments: list[str] | None = None, *, prog: str | None = None, description: str | None = None) -> int:
    """Runs the command; returns the exit code."""
    started = time.monotonic()
    parser = build_parser(prog, description)
    given, rest = parse_with_overrides(parser, arguments)

    from sana.pipelines.command import run_command

    def work() -> None:
        from sana.pipelines import batch, options
        from sana.utils.logging import setup_logging

        logger = setup_logging()
        if given.pop("version", None) is not None:
            logger.info("--version has no effect")
        for report in batch.run(options.InferenceOptions(**given, overrides=rest)):
            logger.info("%d made, %d already there, in %s", len(report.made), len(report.skipped), report.folder)
            if report.index:
                print(report.index)
        logger.info("done in %.1f s", time.monotonic() - started)

    return run_command(work, debug=bool(given.get("debug")))
