"""Makes pictures of a list of prompts.

python scripts/inference.py                                    (the bundled model, asset/samples_mini.txt)
python scripts/inference.py --config=x.yaml --model_path=hf://owner/repo/weights.pth --txt_file=prompts.txt

Pictures that are already there by the very same recipe are skipped, so a stopped run goes on when it is started again.
Exit codes: 0 done, 1 failure (weights, network, disk, numbers), 2 wrong usage (options, prompt file, config),
3 nothing was loaded, because the pictures do not fit into --max_vram.
"""

import sys

from sana.commands.inference import build_parser, main
from sana.commands.parsing import numbers, tiles

__all__ = ["build_parser", "main", "numbers", "tiles"]

if __name__ == "__main__":
    sys.exit(main(description=__doc__))
