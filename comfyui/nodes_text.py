"""The nodes that turn texts into conditionings. Which tokens are read is decided by sana's text encoders."""

from typing import Any

from .values import Conditioning, Gemma, require_gemma

_INPUTS = {"required": {"text": ("STRING", {"multiline": True}), "GEMMA": ("GEMMA",)}}


class SanaTextEncode:
    """Encodes a prompt behind the instruction (CHI) that the models were trained with."""

    TITLE = "Sana Text Encode"
    CATEGORY = "ExtraModels/Sana"
    DESCRIPTION = "Encodes a prompt as Sana reads it. For the negative text use Gemma Text Encode."
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "encode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  ComfyUI's name
        """Returns the inputs, in the order of their widgets."""
        return _INPUTS

    def encode(self, text: str, GEMMA: Gemma) -> tuple[Conditioning]:
        """Returns the CONDITIONING."""
        return (require_gemma(GEMMA).conditioning(text, null=False),)


class GemmaTextEncode:
    """Encodes a text without the instruction: what guidance steers away from."""

    TITLE = "Gemma Text Encode"
    CATEGORY = "ExtraModels/Gemma"
    DESCRIPTION = "Encodes a negative text, as SanaPipeline does: without the instruction. Empty is the usual choice."
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "encode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """Returns the inputs, in the order of their widgets."""
        return _INPUTS

    def encode(self, text: str, GEMMA: Gemma) -> tuple[Conditioning]:
        """Returns the CONDITIONING."""
        return (require_gemma(GEMMA).conditioning(text, null=True),)


class SanaResolutionCond:
    """Notes a size in a conditioning, as PixArt's models read it."""

    TITLE = "Sana Resolution Conditioning"
    CATEGORY = "ExtraModels/Sana"
    DESCRIPTION = "Kept so that older workflows load: the released Sana models do not read the size from the text."
    RETURN_TYPES = ("CONDITIONING",)
    RETURN_NAMES = ("cond",)
    FUNCTION = "add_cond"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """Returns the inputs, in the order of their widgets."""
        side = ("INT", {"default": 1024, "min": 1, "max": 16384})
        return {"required": {"cond": ("CONDITIONING",), "width": side, "height": side}}

    def add_cond(self, cond: Conditioning, width: int, height: int) -> tuple[Conditioning]:
        """Returns a copy of the CONDITIONING with `img_hw` and `aspect_ratio`."""
        noted = {"img_hw": [[height, width]], "aspect_ratio": [[height / width]]}
        return ([[embeds, {**extra, **noted}] for embeds, extra in cond],)
