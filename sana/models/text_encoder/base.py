"""The text encoder interface: prompts in, embeddings and mask out. Which network runs is decided in `load.py`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sana.models.checkpoint import CheckpointError
from sana.models.text_encoder.chi import chi_text, count_dropped_tokens, tokenize_prompts
from sana.utils.logging import get_logger

logger = get_logger(__name__)


class TextEncoderError(CheckpointError):
    """A text encoder, tokenizer or file of embeddings that cannot be had or used; one sentence for the user."""


@dataclass(frozen=True)
class PromptEmbeds:
    """Embeddings of B prompts. Rows whose mask is 0 still hold what the encoder gives for padding tokens: the null
    caption is read under the prompt's mask, so its padding rows count."""

    embeds: Tensor  # (B, L, C)
    mask: Tensor  # (B, L) int64, 1 for real tokens

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "PromptEmbeds":
        """Moves both tensors; only the embeddings take the dtype."""
        return PromptEmbeds(self.embeds.to(device=device, dtype=dtype), self.mask.to(device=device))

    @staticmethod
    def cat(parts: Sequence["PromptEmbeds"]) -> "PromptEmbeds":
        """Joins batches along the first axis."""
        return PromptEmbeds(torch.cat([part.embeds for part in parts]), torch.cat([part.mask for part in parts]))

    def __len__(self) -> int:
        return self.mask.shape[0]


class TextEncoder(nn.Module):
    """A language model whose last hidden states condition the image model (Sana section 3.3).

    Args:
        model: a transformers decoder or encoder; called with `input_ids` and `attention_mask`, it returns
            `last_hidden_state` (B, T, C).
        tokenizer: its tokenizer; prompts are padded on the right whatever the tokenizer's own setting.
        model_max_length: L, the number of tokens the image model sees.
        chi_prompt: the complex human instruction, one string or its lines; empty for none.
        name: what messages and saved files call this encoder.
    """

    uses_chi = True
    attention = "sdpa"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        model_max_length: int = 300,
        chi_prompt: str | Sequence[str | None] | None = (),
        name: str = "",
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.tokenizer = tokenizer
        self.model_max_length = model_max_length
        self.name = name
        self.chi_prompt = chi_text(chi_prompt) if self.uses_chi else ""
        if chi_text(chi_prompt) and not self.uses_chi:
            logger.warning("text_encoder.chi_prompt has no effect: %s follows no instruction", name or "this encoder")

    @staticmethod
    def load_model(folder: Path, **kwargs: Any) -> nn.Module:
        """Loads the network, without a language model head, from a local folder in transformers' layout."""
        from transformers import AutoModel

        return AutoModel.from_pretrained(folder, **kwargs)

    @property
    def hidden_size(self) -> int:
        """C, the width of the embeddings (`text_encoder.caption_channels`)."""
        return self.model.config.hidden_size

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def forward_tokens(
        self, input_ids: Tensor, attention_mask: Tensor, select_index: Tensor, *, trim: bool = False
    ) -> PromptEmbeds:
        """Runs the network on tokens (see `tokenize_prompts`); gradients flow, so an encoder can be trained.

        Args:
            input_ids: (B, T) int64, padded on the right.
            attention_mask: (B, T) int64.
            select_index: (L,) int64.
            trim: leave out the columns that are padding in every row and return zeros there. Real tokens keep their
                embeddings exactly up to rounding; do not use it for null captions, whose padding rows are attended.

        Returns:
            The selected L hidden states and mask values of every row.
        """
        total = input_ids.shape[1]
        length = max(1, int(attention_mask.sum(dim=1).max())) if trim else total
        hidden = self.model(
            input_ids=input_ids[:, :length].to(self.device),
            attention_mask=attention_mask[:, :length].to(self.device),
            **self._call_options(),
        ).last_hidden_state  # (B, length, C)
        if length < total:
            hidden = functional.pad(hidden, (0, 0, 0, total - length))
        index = select_index.to(self.device)
        return PromptEmbeds(hidden[:, index], attention_mask.to(self.device)[:, index])

    def _call_options(self) -> dict[str, Any]:
        return {"use_cache": False}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, chi: bool = True) -> PromptEmbeds:
        """Encodes prompts. On the CPU one by one, so that a prompt's numbers do not depend on its batch.

        Args:
            prompts: B prompts, at least one; any script, used unchanged.
            chi: whether the instruction precedes them (not for null and negative prompts).

        Returns:
            embeds (B, L, C) in the encoder's dtype and mask (B, L).
        """
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"encode() needs a list of at least one prompt, not {prompts!r}.")
        instruction = self.chi_prompt if chi else ""
        tokens = tokenize_prompts(
            self.tokenizer, prompts, chi_prompt=instruction, model_max_length=self.model_max_length
        )
        self._warn_of_truncation(prompts, tokens.attention_mask, instruction)
        rows = 1 if self.device.type == "cpu" else len(prompts)
        parts = [
            self.forward_tokens(ids, mask, tokens.select_index)
            for ids, mask in zip(tokens.input_ids.split(rows), tokens.attention_mask.split(rows), strict=True)
        ]
        return PromptEmbeds.cat(parts)

    def encode_null(self, negative_prompts: Sequence[str] | None = None) -> PromptEmbeds:
        """Encodes what guidance steers away from: "" or negative prompts, always without the instruction.

        Args:
            negative_prompts: B prompts; None for the single null caption "".
        """
        return self.encode([""] if negative_prompts is None else negative_prompts, chi=False)

    def save(self, folder: str | Path) -> None:
        """Writes network and tokenizer in transformers' layout; `load_text_encoder(folder)` reads it."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _warn_of_truncation(self, prompts: Sequence[str], mask: Tensor, instruction: str) -> None:
        for prompt, full in zip(prompts, mask.all(dim=1).tolist(), strict=True):
            if not full:
                continue
            dropped = count_dropped_tokens(
                self.tokenizer, prompt, chi_prompt=instruction, model_max_length=self.model_max_length
            )
            if dropped:
                logger.warning(
                    "the prompt %r is longer than text_encoder.model_max_length=%d allows: its last %d tokens are cut",
                    prompt if len(prompt) <= 60 else f"{prompt[:57]}...",
                    self.model_max_length,
                    dropped,
                )
