"""What `sana data check` does: its options against a configuration, and the table that it prints.

What is looked for is in `sana/data/check.py`.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm

from sana.commands.data_check import TYPES, WORDS
from sana.config import ConfigError, SanaConfig, load_config
from sana.config_extra import data_extra
from sana.data.check import KINDS, CheckOptions, Report, check_data, word_limit
from sana.data.scan import scan
from sana.models.text_encoder.chi import count_dropped_tokens

SHOWN = 5  # problems of a kind in the table


def check(options: argparse.Namespace) -> int:
    """Checks, prints the table, writes the report; returns 1 where something is wrong."""
    config = load_config(options.config) if options.config else None
    places = options.data_dir or [folder for folder in config.data.data_dir if folder]
    found = scan(places, kind=TYPES[options.type] if options.type else None)
    report = check_data(tqdm(found, desc="checking", unit=" images", mininterval=1), check_options(options, config))
    text = json.dumps(report.as_dict(), indent=1, ensure_ascii=False)
    if options.json == "-":
        print(text)
        return 0 if report.clean else 1
    print_table(report)
    if options.json:
        file = Path(options.json)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n", encoding="utf-8")
    return 0 if report.clean else 1


def check_options(options: argparse.Namespace, config: SanaConfig | None) -> CheckOptions:
    """Command line before configuration before defaults."""
    defaults: dict[str, Any] = {"image_size": 512, "aspect_ratio_type": None, "batch_size": 1}
    if config is not None:
        table = config.model.aspect_ratio_type if config.model.multi_scale else None
        defaults = {
            "image_size": config.model.image_size,
            "aspect_ratio_type": table,
            "batch_size": config.train.train_batch_size,
            "max_pixels": data_extra(config.data.extra).max_pixels,
        }
    given = {name: getattr(options, name) for name in ("image_size", "aspect_ratio_type", "batch_size")}
    return CheckOptions(
        **defaults | {name: value for name, value in given.items() if value is not None},
        caption_excess=caption_excess(options, config),
        threads=options.threads,
    )


def caption_excess(options: argparse.Namespace, config: SanaConfig | None) -> Callable[[str], str]:
    """What is too long: by words where --max_words is given or no tokenizer is here, else by tokens."""
    folder = options.tokenizer or (Path(config.text_encoder.text_encoder_name).expanduser() if config else None)
    file = folder / "tokenizer.json" if folder is not None and folder.is_dir() else folder
    if options.tokenizer is not None and not file.is_file():
        raise ConfigError(f"--tokenizer {options.tokenizer} is no tokenizer.json, and holds none.")
    if options.max_words is not None or file is None or not file.is_file():
        return word_limit(options.max_words or WORDS)
    tokenizer = _Tokens(file)
    chi = config.text_encoder.chi_prompt if config else ()
    length = config.text_encoder.model_max_length if config else 300

    def excess(caption: str) -> str:
        dropped = count_dropped_tokens(tokenizer, caption, chi_prompt=chi, model_max_length=length)
        return f"its last {dropped} tokens are cut (text_encoder.model_max_length is {length})" if dropped else ""

    return excess


class _Tokens:
    """A tokenizer.json with the one method that counting tokens needs."""

    def __init__(self, file: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(file))
        self.tokenizer.no_truncation()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids


def print_table(report: Report) -> None:
    """Prints counts, sizes, buckets and the first problems of each kind."""
    content = report.as_dict()
    print(f"{content['images']} images, {content['captions']} captions")
    sizes = content["sizes"]
    if "height" in sizes:
        for side in ("height", "width"):
            print(f"{side:>8}: {sizes[side]['min']} to {sizes[side]['max']} pixels, median {sizes[side]['median']:g}")
        print(f"{sizes['smaller_than_wanted']} images are smaller than training wants them and would be enlarged")
        print("buckets: " + ", ".join(f"{bucket}: {count}" for bucket, count in content["buckets"].items()))
    for kind, entries in report.problems.items():
        print(f"{len(entries):>8}  {KINDS[kind]}")
        for entry in entries[:SHOWN]:
            print(f"{'':>10}{entry['key']}: {entry['detail']}")
        if len(entries) > SHOWN:
            print(f"{'':>10}... and {len(entries) - SHOWN} more (--json has all)")
    print("clean" if report.clean else "not clean")
