"""Serves pictures over HTTP with several replicas, on one machine or many, by Ray Serve: what `serve.py` serves, each.
Needs: pip install 'sana-python[ray]'

python scripts/serve_ray.py                       (the bundled model, 1 to 2 replicas on this machine)
python scripts/serve_ray.py --model_path=hf://owner/repo --num_gpus=1 --min_replicas=2 --max_replicas=8
python scripts/serve_ray.py --ray_address=HEAD:6379 --host=0.0.0.0 --api_key_file=keys.txt

Without --ray_address a Ray is started on this machine and ends with the command; its dashboard and its usage
statistics are off. The address is printed when replicas answer. SIGTERM and Ctrl-C end it as they end `serve.py`.
Limits, such as --max_active and --max_queue, hold for each replica. Exit codes: 0 ended as asked, 1 failure (weights,
network, address in use, no replica), 2 wrong usage.
"""

import sys

from sana.commands.serve_ray import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    sys.exit(main(description=__doc__))
