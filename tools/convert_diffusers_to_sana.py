"""Turns a diffusers Sana folder into a Sana checkpoint or folder; the work is in `sana/commands/from_diffusers.py`.

Exit codes: 0 written, 1 the folder could not be read or converted, 2 wrong arguments.
"""

import sys

from sana.commands.from_diffusers import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    sys.exit(main(description=__doc__))
