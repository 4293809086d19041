"""T5, the text encoder of earlier diffusion transformers; it follows no instruction. Names are in `load.py`."""

from pathlib import Path
from typing import Any

from torch import nn

from sana.models.text_encoder.base import TextEncoder


class T5TextEncoder(TextEncoder):
    """The encoder half of T5 v1.1 (small to xxl); `chi_prompt` has no effect on it."""

    uses_chi = False
    causal = False
    attention = "eager"

    @staticmethod
    def load_model(folder: Path, **kwargs: Any) -> nn.Module:
        from transformers import T5EncoderModel

        return T5EncoderModel.from_pretrained(folder, **kwargs)

    @property
    def hidden_size(self) -> int:
        return self.model.config.d_model

    def _call_options(self) -> dict[str, Any]:
        return {}
