"""Text encoding on tensors without storage: the calls of `TextEncoder.encode`, whose lengths are given here."""

from typing import Any

import torch
from torch import Tensor

from sana.config import SanaConfig
from sana.models.text_encoder.chi import chi_text
from sana.models.text_encoder.prefix_cache import MIN_TOKENS, compute_prefix, encode_after, supports_prefix

LETTERS_A_TOKEN = 4  # of English in the vocabularies of Gemma and Qwen, where no tokenizer is at hand


def encode(model: Any, config: SanaConfig, prompts: int, length: int, *, null: bool, device: str) -> list[Tensor]:
    """Encodes prompts of `length` tokens, and the null caption.

    Args:
        model: the text encoder's network.
        config: its section text_encoder is read.
        prompts: number of prompts.
        length: of each in tokens, the instruction not counted.
        null: whether the null caption is encoded too.
        device: where the network is.
    """
    instruction = len(chi_text(config.text_encoder.chi_prompt)) // LETTERS_A_TOKEN
    rows = 1 if device == "cpu" else prompts
    found = []
    for _ in range(prompts // rows):
        ids = torch.ones(rows, instruction + length, dtype=torch.int64, device=device)
        hidden = model(input_ids=ids, attention_mask=ids, use_cache=False).last_hidden_state
        found.append(hidden[:, -length:].clone())
    if null:
        ids = torch.ones(1, config.text_encoder.model_max_length, dtype=torch.int64, device=device)
        found.append(model(input_ids=ids, attention_mask=ids, use_cache=False).last_hidden_state)
    return found


del MIN_TOKENS, compute_prefix, encode_after, supports_prefix
