"""The nodes that choose a size. Tables of trained sizes are in `sana/data/aspect_ratio.py`."""

from typing import Any

import torch

from . import catalog, host
from .values import Latent

CHANNELS, FACTOR = 32, 32  # of a DC-AE's latents
MAX_SIDE = 16384


class EmptySanaLatentImage:
    """An empty latent of a size in pixels."""

    TITLE = "Empty Sana Latent Image"
    CATEGORY = "ExtraModels/Sana"
    DESCRIPTION = "The size and number of the pictures to make."
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "generate"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  ComfyUI's name
        """Returns the inputs, in the order of their widgets."""
        side: dict[str, Any] = {"default": 512, "min": 16, "max": MAX_SIDE, "step": 8}
        side["tooltip"] = "In pixels. The picture has the next smaller multiple of 32."
        number = {
            "default": 1,
            "min": 1,
            "max": 4096,
            "tooltip": "Pictures; the seeds are seed, seed + 1, ...",
        }
        return {"required": {"width": ("INT", side), "height": ("INT", side), "batch_size": ("INT", number)}}

    def generate(self, width: int, height: int, batch_size: int = 1) -> tuple[Latent]:
        """Returns the LATENT.

        Raises:
            ValueError: a side is below 32 pixels.
        """
        if min(width, height) < FACTOR:
            raise ValueError(f"Sana's pictures have at least {FACTOR} pixels a side, not {width} x {height}.")
        shape = (batch_size, CHANNELS, height // FACTOR, width // FACTOR)
        return ({"samples": torch.zeros(shape, device=host.latent_device())},)


class EmptyDCAELatentImage(EmptySanaLatentImage):
    """The same under its other name."""

    TITLE = "Empty DCAE Latent Image"
    CATEGORY = "latent"


class SanaResolutionSelect:
    """A size that the models were trained on."""

    TITLE = "Sana Resolution Select"
    CATEGORY = "ExtraModels/Sana"
    DESCRIPTION = "Width and height of a trained shape."
    RETURN_TYPES = ("INT", "INT")
    RETURN_NAMES = ("width", "height")
    FUNCTION = "get_res"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """Returns the inputs, in the order of their widgets."""
        ratio = {"default": "1.00", "tooltip": "Width / height: 0.25 is tall, 4.00 is wide."}
        return {
            "required": {
                "model": (list(catalog.SIZES), {"tooltip": "What the model was trained at."}),
                "ratio": (list(catalog.SIZES["1024px"]), ratio),
            }
        }

    def get_res(self, model: str, ratio: str) -> tuple[int, int]:
        """Returns width and height in pixels."""
        return catalog.SIZES[model][ratio]
