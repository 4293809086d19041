"""Makes a picture again from the recipe in its own PNG, and says whether it is the same.

sana replay output/inference/sana_tiny/a_red_apple_1a2b3c4d.png

Exit codes: 0 every pixel is the same, 1 the pictures differ (and how) or none could be made, 2 wrong usage.
"""

import argparse
from pathlib import Path

from sana.commands.parsing import add_json, new_parser, show


def build_parser(prog: str | None = None, description: str | None = None) -> argparse.ArgumentParser:
    """Returns the parser."""
    parser = new_parser(prog, description or __doc__)
    parser.add_argument("png", type=Path, help="a picture written by sana generate or scripts/inference.py")
    parser.add_argument("--model_path", help="weights instead of the recorded ones")
    parser.add_argument("--config", help="YAML instead of the recorded one")
    parser.add_argument("--output", type=Path, help="the new picture (default: <name>.replay.png beside the old one)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 or mps (default: cuda where there is one)")
    add_json(parser)
    return parser


def main(arguments: list[str] | None = None, *, prog: str | None = None, description: str | None = None) -> int:
    """Runs the command; returns the exit code."""
    given = vars(build_parser(prog, description).parse_args(arguments))
    as_json = given.pop("json")

    from sana.pipelines.command import FAILURE, OK, run_command

    def work() -> int:
        from sana.pipelines.replay import replay
        from sana.utils.logging import setup_logging

        setup_logging()
        report = replay(**given)
        if report.identical:
            lines = [f"the same picture, every pixel: {report.output}"]
        else:
            lines = [f"{report.pixels_differ} pixels differ, by at most {report.greatest} of 255: {report.output}"]
        lines += [f"differs: {line}" for line in report.differences]
        if not report.identical and not report.differences:
            lines.append("differs: nothing in the recipe; another CPU or library may round otherwise")
        found = {**vars(report), "output": str(report.output), "identical": report.identical}
        show(found, "\n".join(lines), as_json=as_json)
        return OK if report.identical else FAILURE

    return run_command(work)
