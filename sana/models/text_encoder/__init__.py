"""Text encoders: prompts to embeddings. `load_text_encoder` finds and loads one; `TextEncoder` runs it."""

from sana.models.text_encoder.base import PromptEmbeds, TextEncoder, TextEncoderError
from sana.models.text_encoder.chi import CHI_PROMPT, tokenize_prompts
from sana.models.text_encoder.load import load_text_encoder, require_text_encoder
from sana.models.text_encoder.precomputed import (
    PrecomputedTextEncoder,
    load_prompt_embeds,
    save_prompt_embeds,
)

__all__ = [
    "CHI_PROMPT",
    "PrecomputedTextEncoder",
    "PromptEmbeds",
    "TextEncoder",
    "TextEncoderError",
    "load_prompt_embeds",
    "load_text_encoder",
    "require_text_encoder",
    "save_prompt_embeds",
    "tokenize_prompts",
]
