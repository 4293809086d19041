"""Serves pictures over HTTP, in the form of OpenAI's image interface. Needs: pip install 'sana-python[serve]'

python scripts/serve.py                                        (the bundled model, http://127.0.0.1:8000)
python scripts/serve.py --model_path=hf://owner/repo --host=0.0.0.0 --api_key_file=keys.txt

curl http://127.0.0.1:8000/v1/images/generations -H 'Content-Type: application/json' -d '{"prompt": "a red circle"}'

The address is printed when the server is ready. SIGTERM and Ctrl-C end it: what is in work is finished, what waits is
handed back with 503. Exit codes: 0 ended as asked, 1 failure (weights, network, address in use), 2 wrong usage,
3 nothing was loaded, because the pictures do not fit into --max_vram.
"""

import sys

from sana.commands.serve import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    sys.exit(main(description=__doc__))
