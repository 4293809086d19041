"""Text embeddings during joint training of the text encoder: trimmed to real tokens, null captions as at inference."""

from typing import Any

import torch
from torch import Tensor, nn


class CaptionEncoder(nn.Module):
    """captions -> (embeddings, mask), with gradients, equal to what `TextEncoder` computes at inference.

    The window is the first token and those from the last CHI token on (`select_index` of the pipeline), cut after the
    longest caption of the batch: later positions are masked anyway. A dropped caption is replaced by the embedding of
    the empty text without CHI and keeps its mask, because that is the null branch of the pipeline.

    Args:
        tokenizer: pads on the right.
        model: decoder whose last hidden state is the embedding.
        chi_prompt: lines of the instruction that precedes each caption.
        model_max_length: tokens of the window at most.
        sharded: the model must be called equally often by all processes, whether captions are dropped or not.
    """

    def __init__(
        self, tokenizer: Any, model: nn.Module, chi_prompt: list[str], model_max_length: int, *, sharded: bool = False
    ) -> None:
        super().__init__()
        self.sharded = sharded
        self.tokenizer, self.model, self.model_max_length = tokenizer, model, model_max_length
        self.chi = "\n".join(chi_prompt)
        self.window_start = max(1, len(tokenizer.encode(self.chi)) - 1) if self.chi else 1

    def forward(self, captions: list[str], dropped: Tensor) -> tuple[Tensor, Tensor]:
        """(B captions, (B,) bool) -> embeddings (B, L, C) and mask (B, L) int64."""
        device = next(self.model.parameters()).device
        limit = self.window_start + self.model_max_length - 1
        texts = [self.chi + caption for caption in captions]
        tokens = self.tokenizer(texts, padding="longest", truncation=True, max_length=limit, return_tensors="pt").to(
            device
        )
        embeds = self._window(self._hidden(tokens))
        mask = self._window(tokens.attention_mask)
        if self.sharded or dropped.any():
            tokens = self.tokenizer(
                [""], padding="max_length", truncation=True, max_length=embeds.shape[1], return_tensors="pt"
            ).to(device)
            embeds = torch.where(dropped.to(device)[:, None, None], self._hidden(tokens).to(embeds.dtype), embeds)
        return embeds, mask

    def _hidden(self, tokens) -> Tensor:
        return self.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False)[0]

    def _window(self, sequence: Tensor) -> Tensor:
        return torch.cat([sequence[:, :1], sequence[:, self.window_start :]], dim=1)
