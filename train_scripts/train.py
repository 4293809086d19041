"""Trains a model: python train_scripts/train.py CONFIG.yaml [--section.key=value ...]

The same command goes on from the newest checkpoint of its --work_dir. Also under torchrun and accelerate launch.
Exit codes: 0 done, 1 the training failed, 2 wrong arguments or configuration, 130 / 143 stopped by SIGINT / SIGTERM.
"""

import sys

from sana.commands.train import train


def main(arguments: list[str]) -> int:
    """Trains in this process; returns the exit code."""
    return train(arguments, __doc__)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
