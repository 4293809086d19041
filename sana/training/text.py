"""Captions to text features during training: frozen encoder, whole batches, only real tokens are computed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sana.models.text_encoder import PrecomputedTextEncoder, TextEncoder
from sana.models.text_encoder.chi import tokenize_prompts


@torch.no_grad()
def embed_captions(
    encoder: TextEncoder | PrecomputedTextEncoder | None, captions: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Embeds captions with the instruction before them, as the pipeline does for prompts.

    The instruction is computed once for the whole run, and the features end with the longest caption of the batch: the
    text encoder and the transformer compute no padding that no row has.

    Args:
        encoder: a text encoder, or embeddings computed before.
        captions: B texts.

    Returns:
        Embeddings (B, L, C), zero where the mask (B, L) int64 is; L is at most the encoder's `model_max_length`.
    """
    assert encoder is not None
    if isinstance(encoder, PrecomputedTextEncoder):
        found = encoder.encode(list(captions))
        return found.embeds, found.mask
    tokens = tokenize_prompts(
        encoder.tokenizer, captions, chi_prompt=encoder.chi_prompt, model_max_length=encoder.model_max_length
    )
    found = encoder.encode_tokens(tokens, trim=True)
    return found.embeds, found.mask
