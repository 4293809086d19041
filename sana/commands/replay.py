"""Makes a picture again from the recipe in its own PNG, and says whether it is the same.

sana replay output/inference/sana_tiny/a_red_apple_1a2b3c4d.png

Exit codes: 0 every pixel is the same, 1 the pictures differ (and how) or none could be made, 2 wrong usage.
"""

import argparse
from pathlib import Path

from sana.commands.parsing import new_parser


def build_parser(prog: str | None = None, description: str | None = None) -> argparse.ArgumentParser:
    """Returns the parser."""
    parser = new_parser(prog, description or __doc__)
    parser.add_argument("png", type=Path, help="a picture written by sana generate or scripts/inference.py")
    parser.add_argument("--model_path", help="weights instead of the recorded ones")
    parser.add_argument("--config", help="YAML instead of the recorded one")
    parser.add_argument("--output", type=Path, help="the new picture (default: <name>.replay.png beside the old one)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 or mps (default: cuda where there is one)")
    return parser


def main(arguments: list[str] | None = None, *, prog: str | None = None, description: str | None = None) -> int:
    """Runs the command; returns the exit code."""
    args = build_parser(prog, description).parse_args(arguments)

    from sana.pipelines.command import FAILURE, OK, run_command

    def work() -> int:
        from sana.pipelines.replay import replay
        from sana.utils.logging import setup_logging

        setup_logging()
        report = replay(**vars(args))
        if report.identical:
            print(f"the same picture, every pixel: {report.output}")
        else:
            print(f"{report.pixels_differ} pixels differ, by at most {report.greatest} of 255: {report.output}")
        for line in report.differences:
            print(f"differs: {line}")
        if not report.identical and not report.differences:
            print("differs: nothing in the recipe; another CPU or library may round otherwise")
        return OK if report.identical else FAILURE

    return run_command(work)
