"""Lists what would spoil training in folders of images or tar shards: a table, and JSON with --json.

    python tools/data_check.py asset/example_data
    python tools/data_check.py shards --type SanaWebDatasetMS --config CONFIG.yaml --json report.json

Found are: unreadable images, images without a caption, captions without an image, damaged caption files, duplicates,
buckets with fewer images than a batch, over-long captions. Exit codes: 0 clean; 1 problems, or no image at all; 2 wrong
arguments. Nothing is changed.
"""

import sys

from sana.commands.data_check import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    sys.exit(main(description=__doc__))
