"""Feature extractors for the Fréchet distance, read from files that the user gives; nothing is fetched.

The distance itself is in `ae_metrics.py`.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.models.checkpoint import CheckpointError, read_file
from sana.training.dcae_losses import load_exactly

SIDE = 299
FID_CLASSES, TORCHVISION_CLASSES = 1008, 1000
KINDS = {
    FID_CLASSES: "Inception-v3 of TensorFlow (2015-12-05), as published FIDs use",
    TORCHVISION_CLASSES: "Inception-v3 of torchvision, not comparable with published FIDs",
}


class InceptionFeatures(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> (B, 2048) features after the last pooling.

    The file's classifier tells the network: 1008 classes is the port of TensorFlow's network to PyTorch
    (`pt_inception-2015-12-05-6726825d.pth` of pytorch-fid), whose pooling branches differ; 1000 is torchvision's own.

    Args:
        path: .pth or .safetensors.

    Raises:
        CheckpointError: the file is no Inception-v3.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        from torchvision.models import inception_v3

        state = {key: value for key, value in read_file(path).items() if not key.startswith("AuxLogits.")}
        classes = len(state["fc.weight"]) if "fc.weight" in state else None
        if classes not in KINDS:
            raise CheckpointError(
                f"{path} is no Inception-v3 for FID: it needs fc.weight with {FID_CLASSES} rows (pytorch-fid's file) "
                f"or {TORCHVISION_CLASSES} (torchvision's)."
            )
        self.kind = KINDS[classes]
        self.network = inception_v3(weights=None, num_classes=classes, aux_logits=False, init_weights=False)
        load_exactly(self.network, state, path, "an Inception-v3")
        self.network.fc = nn.Identity()
        if classes == FID_CLASSES:
            _pool_as_tensorflow(self.network)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        resized = F.interpolate(images.float(), (SIDE, SIDE), mode="bilinear", align_corners=False)
        return self.network(resized)


def _pool_as_tensorflow(network: nn.Module) -> None:
    """Average pooling without the padding's zeros; the last block takes the maximum instead."""
    blocks = [getattr(network, f"Mixed_{name}") for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b")]
    for block in blocks:
        block.branch_pool.register_forward_pre_hook(_without_padding)
    pooled: list[Tensor] = []
    network.Mixed_7c.register_forward_pre_hook(lambda _, inputs: pooled.append(F.max_pool2d(inputs[0], 3, 1, 1)))
    network.Mixed_7c.branch_pool.register_forward_pre_hook(lambda _, inputs: (pooled.pop(),))


def _without_padding(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """A 3 x 3 mean with zeros around the image -> the mean of the pixels that are there."""
    (pooled,) = inputs
    part = F.avg_pool2d(torch.ones_like(pooled[:1, :1]), 3, 1, 1)  # of the window inside the image
    return (pooled / part,)
