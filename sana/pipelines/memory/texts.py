"""Text encoding on tensors without storage: the calls of `TextEncoder.encode`, whose lengths are given here."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sana.models.text_encoder.base import TextEncoder
from sana.models.text_encoder.prefix_cache import MIN_TOKENS, Prefix, compute_prefix, supports_prefix


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens.

    Attributes:
        instruction: of the text before every prompt; 0 for none.
        prompt: of every prompt, as many as the image model sees.
        limit: `model_max_length`, the length of the null caption.
    """

    instruction: int
    prompt: int
    limit: int

    @property
    def total(self) -> int:
        """Tokens that the network sees of one prompt, see `sana.models.text_encoder.chi.token_budget`."""
        return self.instruction + self.prompt - 2 if self.instruction else self.prompt


class TextRun:
    """Encodes texts of given lengths with a network that has no weights, as a pipeline does.

    Args:
        network: of transformers.
        kind: the class that the pipeline puts around it.
        lengths: of the texts.
        device: where it is.
        together: whether all prompts run in one call; None: not on a CPU.
    """

    def __init__(
        self, network: Any, kind: type[TextEncoder], lengths: Lengths, device: str, *, together: bool | None = None
    ) -> None:
        self.network = network
        self.kind = kind
        self.lengths = lengths
        self.device = device
        self.together = device != "cpu" if together is None else together
        self.prefix: Prefix | None = None

    def encode(self, prompts: int) -> list[Tensor]:
        """Returns the features that a pipeline keeps of prompts: (prompt, C) each."""
        rows = prompts if self.together else 1
        reuse = self.kind.uses_chi and self.kind.causal and self.lengths.instruction > 0
        reuse = reuse and supports_prefix(self.network.config, self.lengths.total)
        if reuse and self.lengths.instruction >= MIN_TOKENS:
            self.prefix = compute_prefix(self.network, self._ones(1, self.lengths.instruction)[0], self._device)
        found = torch.cat([self._rows(rows, reuse) for _ in range(prompts // rows)])
        torch.isfinite(found).all()
        return [row.clone() for row in found]

    def encode_null(self) -> list[Tensor]:
        """Returns the features that a pipeline keeps of the null caption: (limit, C)."""
        hidden = self._call(self._ones(1, self.lengths.limit))
        found = torch.cat([self._selected(hidden, self.lengths.limit)])
        torch.isfinite(found).all()
        return [row.clone() for row in found]

    def stack(self, features: list[Tensor], rows: int) -> Tensor:
        """Returns the features of a batch as the transformer reads them: (rows, L, C)."""
        embeds = features[0].new_zeros(rows, *features[0].shape)
        for row in range(rows):
            embeds[row] = features[row % len(features)]
        return embeds

    def _rows(self, rows: int, reuse: bool) -> Tensor:
        total, prompt = self.lengths.total, self.lengths.prompt
        hidden = self._after_prefix(rows, total) if reuse else self._call(self._ones(rows, total))
        found = self._selected(hidden, prompt)
        return found.masked_fill(torch.zeros(rows, prompt, 1, dtype=torch.bool, device=self.device), 0.0)

    def _after_prefix(self, rows: int, total: int) -> Tensor:
        """The calls of `sana.models.text_encoder.prefix_cache.encode_after`."""
        prefix = self.prefix or Prefix(self._ones(1, 0)[0], self._ones(1, 0), ())
        shared = len(prefix.ids)
        cache, parts = prefix.as_cache(rows, shared), []
        if shared:
            parts.append(prefix.hidden.expand(rows, -1, -1))
        mask = self._ones(rows, total)
        parts.append(
            self.network(
                input_ids=mask[:, shared:], attention_mask=mask, past_key_values=cache, use_cache=True
            ).last_hidden_state
        )
        return torch.cat(parts, dim=1)

    def _call(self, ids: Tensor) -> Tensor:
        options = {"use_cache": False} if self.kind.causal else {}
        return self.network(input_ids=ids, attention_mask=ids, **options).last_hidden_state

    @staticmethod
    def _selected(hidden: Tensor, count: int) -> Tensor:
        return hidden[:, torch.arange(count, device=hidden.device)]

    def _ones(self, rows: int, length: int) -> Tensor:
        return torch.ones(rows, length, dtype=torch.int64, device=self.device)

    @property
    def _device(self) -> torch.device:
        return torch.device(self.device)
