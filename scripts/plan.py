"""Says what pictures or a training run need in memory, and which settings make them fit. Nothing is loaded or fetched.

python scripts/plan.py                                         (the bundled model as the pipeline runs it here)
python scripts/plan.py --config=configs/sana_config/4096ms/Sana_1600M_img4096_bf16.yaml --device=cuda --max_vram=8GB
python scripts/plan.py --config=x.yaml --train --device=cuda --max_vram=32GB

Amounts of memory have a unit: MB and GB are 10^6 and 10^9 bytes, MiB and GiB 2^20 and 2^30.
Exit codes: 0 it fits, 1 failure (weights, disk), 2 wrong usage (options, config), 3 nothing fits into --max_vram.
"""

import sys

from sana.commands.plan import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    sys.exit(main(description=__doc__))
