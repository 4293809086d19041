"""Qwen2, an instruction-following text encoder of the configs. Loading and names are in `load.py`."""

from sana.models.text_encoder.base import TextEncoder


class Qwen2TextEncoder(TextEncoder):
    """Qwen2 (0.5B-Instruct, 1.5B-Instruct). Its tokenizer has no begin token, so "" becomes one padding token."""
