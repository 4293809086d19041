"""Gemma-1 and Gemma-2, the text encoders of the released models. Loading and names are in `load.py`."""

from sana.models.text_encoder.base import TextEncoder


class GemmaTextEncoder(TextEncoder):
    """Gemma-1 (2b, 2b-it)."""


class Gemma2TextEncoder(TextEncoder):
    """Gemma-2 (2b, 2b-it, 9b, 9b-it). Its attention logits are soft-capped, which only eager attention computes."""

    attention = "eager"
