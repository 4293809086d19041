"""Writes a Sana checkpoint in the layout of diffusers; the work is in `sana/commands/to_diffusers.py`.

Exit codes: 0 written, 1 the weights could not be read or converted, 2 wrong arguments.
"""

import sys

from sana.commands.to_diffusers import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    sys.exit(main(description=__doc__))
