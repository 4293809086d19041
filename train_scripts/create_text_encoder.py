"""Creates the untrained text encoder of the bundled model: python train_scripts/create_text_encoder.py FOLDER"""

import itertools
import sys
from pathlib import Path

import torch

from sana.data.scenes import scenes
from sana.models.text_encoder.tiny import create_text_encoder

CHI = "Draw this picture."


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    torch.manual_seed(0)
    captions = [scene.caption for scene in itertools.islice(scenes(5), 20000)]
    create_text_encoder(Path(arguments[0]), [*captions, *[CHI] * 1000])
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
