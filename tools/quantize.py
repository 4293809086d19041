"""Makes a model folder with quantised weights; `SanaPipeline.from_pretrained` and --model_path load it as it is.

    python tools/quantize.py --model_path asset/models/sana_tiny --scheme int8 --output output/sana_tiny_int8
    python tools/quantize.py --config=configs/... --model_path=hf://... --scheme nf4 --text_encoder nf4 --output DIR

Schemes: int8 (8-bit weights), int8-dynamic (8-bit weights and inputs), nf4 (4-bit, bitsandbytes), int4 (4-bit, needs a
CUDA device), fp8 (needs a Hopper GPU). The exact network is never in memory as a whole. Exit code 2: wrong arguments;
1: the model could not be read, or the folder not written.
"""

import sys

from sana.commands.quantize import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    sys.exit(main(description=__doc__))
