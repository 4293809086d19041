"""Says what is installed, which devices, number formats and kernels are used and why, and what is missing.

    sana doctor                                                    (makes one small picture with the bundled model)
    sana doctor --no_model --json

Missing parts stand with the command that installs them. Nothing is changed, and nothing is asked over the network.
Exit codes: 0 everything that is needed is in order, 1 something is not (the last lines say what to run), 2 wrong usage.
"""

import argparse
import json
from collections.abc import Sequence

from sana.commands.parsing import new_parser
from sana.pipelines.command import FAILURE, OK, run_command
from sana.pipelines.doctor import ABSENT, BROKEN, Diagnosis, diagnose

MARKS = {"ok": "ok", ABSENT: "--", BROKEN: "!!"}
TITLES = {
    "python": "Python", "packages": "Packages", "extras": "Optional extras", "devices": "Devices and dtypes",
    "kernels": "Kernels", "model": "Bundled model", "hub": "Hugging Face hub", "disk": "Disk",
}  # fmt: skip


def build_parser(prog: str | None = None, description: str | None = None) -> argparse.ArgumentParser:
    """Returns the parser."""
    parser = new_parser(prog, description or __doc__)
    parser.add_argument("--no_model", action="store_true", help="do not load the bundled model")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(argv: Sequence[str] | None = None, *, prog: str | None = None, description: str | None = None) -> int:
    """Looks and prints; returns the exit code."""
    options = build_parser(prog, description).parse_args(argv)

    def work() -> int:
        diagnosis = diagnose(self_check=not options.no_model)
        print(json.dumps(diagnosis.as_dict(), indent=2) if options.json else as_text(diagnosis))
        return OK if diagnosis.healthy else FAILURE

    return run_command(work)


def as_text(diagnosis: Diagnosis) -> str:
    """Returns the findings by part, and at the end the commands that mend what is broken."""
    lines = []
    width = max(len(one.name) for one in diagnosis.findings)
    for part in dict.fromkeys(one.part for one in diagnosis.findings):
        lines += ["", TITLES.get(part, part)]
        for one in diagnosis.findings:
            if one.part == part:
                lines.append(f"  {MARKS[one.state]}  {one.name:<{width}}  {one.text}")
                lines += [f"      {'':<{width}}  -> {one.fix}"] if one.fix else []
    if diagnosis.healthy:
        lines += ["", "Everything that is needed is in order."]
    else:
        lines += ["", "Something that is needed is not in order. Run:", *(f"  {fix}" for fix in diagnosis.fixes)]
    return "\n".join(lines[1:])
