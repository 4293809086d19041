"""Trains a model: python train_scripts/train.py CONFIG.yaml [--section.key=value ...]

The same command goes on from the newest checkpoint of its --work_dir. Also under torchrun and accelerate launch.
Exit codes: 0 done, 1 the training failed, 2 wrong arguments or configuration, 130 / 143 stopped by SIGINT / SIGTERM.
"""

import sys

from sana.config import load_config
from sana.pipelines.command import OK, USAGE, run_command
from sana.utils.distributed import is_main_process
from sana.utils.logging import setup_logging


def main(arguments: list[str]) -> int:
    """Returns the exit code; every failure that a user can mend is one sentence."""
    path = next((a for a in arguments if not a.startswith("--")), None)
    path = path or next((a.split("=", 1)[1] for a in arguments if a.startswith("--config_path=")), None)
    if path is None or {"--help", "-h"} & set(arguments):
        print(__doc__, file=sys.stderr)
        return OK if {"--help", "-h"} & set(arguments) else USAGE

    def work() -> int:
        setup_logging()
        config = load_config(path, [a for a in arguments if a.startswith("--") and not a.startswith("--config_path=")])
        from sana.training.trainer import StoppedBySignal, Trainer  # takes seconds: a typo is told before

        try:
            Trainer(config).train()
        except StoppedBySignal as stop:
            if is_main_process():
                print(stop, file=sys.stderr)
            return stop.exit_code
        return OK

    return run_command(work)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
