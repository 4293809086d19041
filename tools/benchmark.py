"""Times the bundled model on this machine: start to ready, one picture, and the greatest memory. It makes no claims.

python tools/benchmark.py --repeats=5
"""

import time

STARTED = time.perf_counter()

import argparse  # noqa: E402
import resource  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402

from sana import SanaPipeline  # noqa: E402

MODEL = Path(__file__).parents[1] / "asset/models/sana_tiny"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", default=str(MODEL), help="model folder or id")
    parser.add_argument("--repeats", type=int, default=5, help="timed pictures, after one that is not timed")
    parser.add_argument("--step", type=int, default=20)
    options = parser.parse_args()
    pipeline = SanaPipeline.from_pretrained(options.model_path)
    pipeline("a red circle", num_inference_steps=options.step, seed=0)
    print(f"process start to first picture   {time.perf_counter() - STARTED:8.2f} s")
    times = []
    for repeat in range(options.repeats):
        started = time.perf_counter()
        pipeline("two cats and a red apple on a blue background", num_inference_steps=options.step, seed=repeat)
        times.append(time.perf_counter() - started)
    print(f"one picture, median of {options.repeats:<3}       {statistics.median(times):8.2f} s")
    print(f"greatest resident memory         {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:8.2f} GiB")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, device {pipeline.device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
