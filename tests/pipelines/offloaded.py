"""What the tests of offload share: a call, the kinds, and the stand-in for a device. No test is here."""

import math
from pathlib import Path

import torch

from sana.pipelines.offload import Offloadable, _Offload
from tests.models.layers.stand_in import StandIn

CALL = {"prompt": ["a cat", "two dogs by the sea"], "seed": 3, "num_inference_steps": 3, "progress_bar": False}
KINDS = {
    "model": _Offload("model"),
    "sequential": _Offload("sequential", group=1),
    "group": _Offload("group", group=1, prefetch=True),
    "group of two": _Offload("group", group=2, prefetch=True),
    "group without stream": _Offload("group", group=1),
}
BUNDLED = Path("asset/models/sana_tiny")
PICTURE = {"prompt": "a red circle above a blue square", "seed": 1, "num_inference_steps": 8, "progress_bar": False}


def put_away(pipeline: Offloadable, kind: str) -> StandIn:
    """Offloads a pipeline to a stand-in for the host."""
    mover, asked = StandIn(), KINDS[kind]
    pipeline._change(_Offload(asked.kind, mover, asked.group, asked.prefetch))
    return mover


def psnr(image: torch.Tensor, wanted: torch.Tensor) -> float:
    """In dB, of images in [-1, 1]."""
    return 10 * math.log10(4 / float((image.clamp(-1, 1) - wanted.clamp(-1, 1)).square().mean()))
