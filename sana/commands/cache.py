"""Computes latents and text features of a data set to disk, for training with data.load_vae_feat and load_text_feat.

    sana cache CONFIG.yaml --data.data_dir="[folder]" --feature_dir=features [--section.key=value]
    torchrun --nproc_per_node 8 -m sana.cli cache CONFIG.yaml --feature_dir=features   # or accelerate launch

It may be killed at any time and goes on where it was; run again after images or captions changed, it computes those.
Then train with --data.load_vae_feat=true --data.load_text_feat=true --data.extra.feature_dir=features.

Exit codes: 0 everything is cached (broken samples within the budget are named and skipped); 1 data, networks or disk
failed, or the folder holds features of other networks or settings; 2 wrong arguments or configuration.
"""

import argparse
from collections.abc import Sequence

from sana.commands.parsing import add_json, new_parser, show
from sana.pipelines.command import run_command
from sana.utils.distributed import rank
from sana.utils.logging import setup_logging

DTYPES = ("fp16", "bf16", "fp32")


def build_parser(prog: str | None = None, description: str | None = None) -> argparse.ArgumentParser:
    """The arguments; those of the form --section.key=value belong to the configuration."""
    parser = new_parser(prog, description or __doc__)
    add = parser.add_argument
    add("config", help="YAML of the training run")
    add("--feature_dir", help="folder to fill [data.extra.feature_dir]")
    add("--only", choices=("latents", "text"), help="compute one kind of features [both]")
    add("--batch_size", type=int, default=8, help="images, and captions, encoded together [8]")
    add("--latents_dtype", choices=DTYPES, default="fp16", help="stored dtype of latents [fp16]")
    add("--text_dtype", choices=DTYPES, help="computed and stored dtype of text features [bf16 on a GPU, else fp32]")
    add("--num_workers", type=int, default=2, help="processes that read images ahead [2]")
    add("--device", help="for example cuda:1 or cpu [this process's GPU, else cpu]")
    add("--shard_samples", type=int, default=512, help="samples of a file; more are never lost by a kill [512]")
    add_json(parser)
    return parser


def main(argv: Sequence[str] | None = None, *, prog: str | None = None, description: str | None = None) -> int:
    """Runs the tool; returns the exit code."""
    parser = build_parser(prog, description)
    options, overrides = parser.parse_known_args(argv)
    if strangers := [text for text in overrides if not (text.startswith("--") and "." in text.split("=")[0])]:
        parser.error(f"unknown arguments: {' '.join(strangers)}; write --section.key=value")
    if options.batch_size < 1 or options.shard_samples < 1 or options.num_workers < 0:
        parser.error("--batch_size and --shard_samples must be at least 1, --num_workers not negative")
    setup_logging()
    return run_command(lambda: cache(options, overrides))


def cache(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Loads the configuration, computes what is missing and says what was done."""
    from sana.config import ConfigError, load_config
    from sana.config_extra import data_extra
    from sana.training.cache_features import CacheOptions, cache_features
    from sana.utils.dtype import parse_dtype

    config = load_config(options.config, overrides)
    feature_dir = options.feature_dir or data_extra(config.data.extra).feature_dir
    if not feature_dir:
        raise ConfigError("Name the folder to fill: --feature_dir, or data.extra.feature_dir of the configuration.")
    summary = cache_features(
        config,
        CacheOptions(
            feature_dir=feature_dir,
            latents=options.only != "text",
            text=options.only != "latents",
            batch_size=options.batch_size,
            latents_dtype=parse_dtype(options.latents_dtype),
            text_dtype=parse_dtype(options.text_dtype) if options.text_dtype else None,
            num_workers=options.num_workers,
            device=options.device,
            shard_samples=options.shard_samples,
        ),
    )
    counts = {"computed": summary.computed, "present": summary.present, "broken": summary.broken}
    show(
        {"feature_dir": str(feature_dir), "process": rank(), **counts},
        f"{feature_dir}: process {rank()} computed {summary.computed} samples, found {summary.present} complete and "
        f"skipped {summary.broken} that cannot be read",
        as_json=options.json,
    )
