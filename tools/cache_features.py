"""Computes latents and text features of a data set to disk, for training with data.load_vae_feat and load_text_feat.

    python tools/cache_features.py CONFIG.yaml --data.data_dir="[folder]" --feature_dir=features [--section.key=value]
    torchrun --nproc_per_node 8 tools/cache_features.py CONFIG.yaml --feature_dir=features   # or accelerate launch

It may be killed at any time and goes on where it was; run again after images or captions changed, it computes those.
Then train with --data.load_vae_feat=true --data.load_text_feat=true --data.extra.feature_dir=features.

Exit codes: 0 everything is cached (broken samples within the budget are named and skipped); 1 data, networks or disk
failed, or the folder holds features of other networks or settings; 2 wrong arguments or configuration.
"""

import sys

from sana.commands.cache import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    sys.exit(main(description=__doc__))
