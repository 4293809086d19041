"""Pictures of 2048 and 4096 px by the bundled model on a CPU: their size, and the memory of the whole process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sana.pipelines.inputs import plan_size

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, re, sys
from sana import SanaPipeline
from sana.pipelines.images import save_png
pixels, path = int(sys.argv[1]), sys.argv[2]
pipeline = SanaPipeline.from_pretrained("asset/models/sana_tiny", device="cpu")
size = {"height": pixels, "width": pixels, "use_resolution_binning": False}
image = pipeline("a red circle", num_inference_steps=2, seed=0, output_type="pil", progress_bar=False, **size)[0]
save_png(image, path, {"prompt": "a red circle"})
status = open("/proc/self/status").read()
peak = re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]
print(json.dumps({"size": image.size, "bytes": 1024 * int(peak)}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("pixels", "gibibytes"), [(2048, 2.5), pytest.param(4096, 4.0, marks=pytest.mark.slow)])
def test_a_process_makes_a_large_picture_in_little_memory(tmp_path, pixels, gibibytes):
    """From its start to the written file, weights, libraries and both guidance branches included.

    ru_maxrss would not do: a process begins with that of its parent.
    """
    path = tmp_path / "picture.png"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(pixels), str(path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["size"] == [pixels, pixels] and found["bytes"] < gibibytes * 2**30
    with Image.open(path) as picture:
        assert picture.size == (pixels, pixels) and np.asarray(picture).std() > 5


@pytest.mark.parametrize("image_size", [2048, 4096])
def test_sizes_are_binned_as_in_diffusers(image_size):
    processor = pytest.importorskip("diffusers.image_processor").PixArtImageProcessor
    pipelines = pytest.importorskip("diffusers.pipelines.sana.pipeline_sana")
    table = getattr(pipelines, f"ASPECT_RATIO_{image_size}_BIN")
    drawn = np.random.default_rng(0).integers(image_size // 2, 2 * image_size, (200, 2))
    compared = 0
    for height, width in [(image_size, image_size), *(tuple(map(int, size)) for size in drawn)]:
        size = plan_size(height, width, factor=32, image_size=image_size, binning=True)
        theirs = processor.classify_height_width_bin(height, width, ratios=table)
        if image_size == 4096 or 0.3 < height / width < 2.7:  # the official table of 2048 px for inference is shorter
            assert (size.model_height, size.model_width) == theirs
            compared += 1
        assert size.model_height % 32 == size.model_width % 32 == 0
        exact = plan_size(height // 32 * 32, width // 32 * 32, factor=32, image_size=image_size, binning=False)
        assert not exact.binned and (exact.model_height, exact.model_width) == (height // 32 * 32, width // 32 * 32)
    assert compared > 150
