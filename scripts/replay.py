"""Makes a picture again from the recipe in its own PNG, and says whether it is the same.

python scripts/replay.py output/inference/sana_tiny/a_red_apple_1a2b3c4d.png

Exit codes: 0 every pixel is the same, 1 the pictures differ (and how) or none could be made, 2 wrong usage.
"""

import sys

from sana.commands.replay import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    sys.exit(main(description=__doc__))
