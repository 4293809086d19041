"""Checks on your own machine what training promises, with your own configuration, before a long run.

    python tools/selftest.py CONFIG.yaml [--section.key=value ...] [--minutes 1] [--json report.json]
    torchrun --nproc_per_node 8 tools/selftest.py CONFIG.yaml

Checked are: everything can be built; random samples can be read; accumulated gradients, gradient checkpointing, the
average of the weights; the loss falls; processes agree; speed, memory and time of the whole run; checkpoints and room
for them; exact resuming. All happens in a temporary folder: work_dir is not touched. Exit codes: 0 all hold (or were
skipped, with the reason), 1 a check failed, 2 wrong arguments or configuration.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from sana.config import ConfigError, load_config
from sana.pipelines.command import run_command
from sana.utils.distributed import is_main_process
from sana.utils.logging import setup_logging


def build_parser() -> argparse.ArgumentParser:
    """The arguments; what is not known here is an override of the configuration."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("config", metavar="CONFIG", help="YAML of the training run")
    add("--minutes", type=float, default=0.25, help="the speed is measured for about as long [0.25]")
    add("--only", nargs="+", default=[], metavar="CHECK", help="only these checks (names as in the table)")
    add("--scratch", type=Path, help="folder for temporary files, on the disk of work_dir best [the system's]")
    add("--json", type=Path, help="write the whole report here")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code."""
    parser = build_parser()
    options, overrides = parser.parse_known_args(argv)
    if not options.minutes >= 0:
        parser.error("--minutes must not be negative")
    setup_logging("WARNING")
    return run_command(lambda: check(options, overrides))


def check(options: argparse.Namespace, overrides: list[str]) -> int:
    """Runs the checks, shows each when it is done, writes the report; returns 1 where one failed."""
    if options.scratch is not None and not options.scratch.is_dir():
        raise ConfigError(f"--scratch {options.scratch} is no folder; make it first.")
    config = load_config(options.config, overrides)
    from sana.training.selftest import Outcome, run_selftest  # takes seconds: a typo is told before

    def show(outcome: Outcome) -> None:
        if is_main_process():
            print(f"{outcome.name:<14} {outcome.status:<8} {outcome.detail}", flush=True)

    outcomes = run_selftest(
        config, minutes=options.minutes, scratch=options.scratch, only=options.only, on_outcome=show
    )
    passed = all(outcome.status != "failed" for outcome in outcomes)
    if options.json and is_main_process():
        report = {"passed": passed, "checks": [outcome.as_dict() for outcome in outcomes]}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
