"""What the parsers of several commands share. Nothing heavy is imported: a command's help takes no time."""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

OVERRIDE = re.compile(r"--[A-Za-z_]\w*(\.\w+)+=.*", re.DOTALL)
SCHEMES = ("int8", "int8-dynamic", "int4", "nf4", "fp8")  # names of sana.models.quantization, which imports torch


def new_parser(prog: str | None, description: str | None, **more: Any) -> argparse.ArgumentParser:
    """Returns a parser that shows its description as it is written; `more` goes to ArgumentParser."""
    return argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **more
    )


def only_given(prog: str | None, description: str | None) -> argparse.ArgumentParser:
    """Returns a parser in whose result an option that was not given is absent; options are not abbreviated."""
    return new_parser(prog, description, allow_abbrev=False, argument_default=argparse.SUPPRESS)


def parse_with_overrides(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[dict[str, Any], list]:
    """Returns the options that were given, and the `--section.key=value` arguments, which belong to a config."""
    known, rest = parser.parse_known_args(argv)
    strangers = [one for one in rest if not OVERRIDE.fullmatch(one)]
    if strangers:
        parser.error(f"unknown argument {strangers[0]} (a config override is written --section.key=value)")
    return vars(known), rest


def truth(text: str) -> bool:
    """Reads a yes or no of the command line."""
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")
    return text.lower() in ("true", "1", "yes")


def numbers(text: str) -> list[float]:
    """Reads "[0, 1]" or "0,1"."""
    try:
        return [float(one) for one in text.strip("[]() ").replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers such as [0,1], not {text!r}") from None


def tiles(text: str) -> bool | int:
    """Reads true, false, or the side of a tile in pixels."""
    return int(text) if text.isdecimal() else truth(text)


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


def flag() -> dict[str, Any]:
    """Returns what `add_argument` needs for an option that is true alone and takes true or false."""
    return {"type": truth, "nargs": "?", "const": True, "metavar": "BOOL"}


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds --json: the result as JSON on standard output."""
    parser.add_argument("--json", action="store_true", default=False, help="print the result as JSON")


def show(result: dict[str, Any], text: str, *, as_json: bool) -> None:
    """Prints a result on standard output: one JSON document, or its text."""
    print(json.dumps(result, indent=2, ensure_ascii=False) if as_json else text)
