"""Trains a model: python train_scripts/train.py CONFIG.yaml [--section.key=value ...]; resumes from its work_dir."""

import sys

from sana.config import ConfigError, load_config
from sana.training.trainer import Trainer
from sana.utils.logging import setup_logging


def main(arguments: list[str]) -> int:
    """Exit code 2: wrong arguments or configuration; 1: the training failed."""
    path = next((a for a in arguments if not a.startswith("--")), None)
    path = path or next((a.split("=", 1)[1] for a in arguments if a.startswith("--config_path=")), None)
    if path is None or "--help" in arguments or "-h" in arguments:
        print(__doc__, file=sys.stderr)
        return 2 if path is None and not {"--help", "-h"} & set(arguments) else 0
    setup_logging()
    overrides = [a for a in arguments if a.startswith("--") and not a.startswith("--config_path=")]
    try:
        trainer = Trainer(load_config(path, overrides))
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    trainer.train()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
