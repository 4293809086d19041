"""The text encoder interface: prompts in, embeddings and mask out. Which network runs is decided in `load.py`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from sana.models.checkpoint import CheckpointError
from sana.models.layers.residency import compute_device, compute_dtype, home_parameters
from sana.models.text_encoder.chi import PromptTokens, chi_text, count_dropped_tokens, tokenize_prompts
from sana.models.text_encoder.prefix_cache import MIN_TOKENS, Prefix, compute_prefix, encode_after, supports_prefix
from sana.utils.logging import get_logger
from sana.utils.transfer import to_device

logger = get_logger(__name__)


class TextEncoderError(CheckpointError):
    """A text encoder, tokenizer or file of embeddings that cannot be had or used; one sentence for the user."""


@dataclass(frozen=True)
class PromptEmbeds:
    """Embeddings of B prompts. Rows whose mask is 0 hold what the encoder gives for padding tokens: the null caption
    is read under the prompt's mask, so its padding rows count. In trimmed prompts they are zero: nobody reads them."""

    embeds: Tensor  # (B, L, C)
    mask: Tensor  # (B, L) int64, 1 for real tokens

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "PromptEmbeds":
        """Moves both tensors; only the embeddings take the dtype."""
        return PromptEmbeds(self.embeds.to(device=device, dtype=dtype), self.mask.to(device=device))

    @staticmethod
    def cat(parts: Sequence["PromptEmbeds"]) -> "PromptEmbeds":
        """Joins batches along the first axis."""
        return PromptEmbeds(torch.cat([part.embeds for part in parts]), torch.cat([part.mask for part in parts]))

    def resized(self, length: int) -> "PromptEmbeds":
        """Cuts all rows to `length` tokens, or appends zeros that the mask hides."""
        missing = length - self.mask.shape[1]
        if missing <= 0:
            return PromptEmbeds(self.embeds[:, :length], self.mask[:, :length])
        return PromptEmbeds(
            functional.pad(self.embeds, (0, 0, 0, missing)),  # (B, L + missing, C)
            functional.pad(self.mask, (0, missing)),
        )

    def longest(self) -> int:
        """Returns the number of tokens up to the last one that a row may read; waits for the device.

        A row without any such token has all of its tokens read, so that its length is L.
        """
        real = self.mask.cpu() != 0
        if not real.any(dim=1).all():
            return real.shape[1]
        return int(real.any(dim=0).nonzero().max()) + 1

    def trimmed(self) -> "PromptEmbeds":
        """Cuts prompts to the longest of them and makes what their masks hide zero; not for null captions."""
        real = self.mask != 0
        unread = (~real & real.any(dim=1, keepdim=True))[..., None]
        return PromptEmbeds(self.embeds.masked_fill(unread, 0.0), self.mask).resized(self.longest())

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
    causal = True  # a token's state depends on earlier tokens only
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
        self._moves = 0
        self._prefix: tuple[tuple[Any, ...], Prefix] | None = None
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
        return compute_device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.model)

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
            input_ids=to_device(input_ids[:, :length], self.device),
            attention_mask=to_device(attention_mask[:, :length], self.device),
            **self._call_options(),
        ).last_hidden_state  # (B, length, C)
        if length < total:
            hidden = functional.pad(hidden, (0, 0, 0, total - length))
        index = to_device(select_index, self.device)
        return PromptEmbeds(hidden[:, index], to_device(attention_mask, self.device)[:, index])

    def _call_options(self) -> dict[str, Any]:
        return {"use_cache": False}

    def fingerprint(self) -> tuple[Any, ...] | None:
        """Returns what decides the embeddings of a text besides the text, or None while the weights may learn.

        Equal fingerprints mean equal embeddings, unless weights were written through `.data`.
        """
        if any(parameter.requires_grad for parameter in home_parameters(self.model)):
            return None
        return (*self._settings(), *((id(one), _version(one)) for one in home_parameters(self.model)))

    def _settings(self) -> tuple[Any, ...]:
        device = self.device
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        return self.chi_prompt, self.model_max_length, id(self.tokenizer), self._moves, device, self.dtype, autocast

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, chi: bool = True, trim: bool = False) -> PromptEmbeds:
        """Encodes prompts. On the CPU one by one, so that a prompt's numbers do not depend on its batch.

        What the network computes for the instruction is computed once a call, or, where no weight requires a gradient,
        once for all calls; real tokens keep their embeddings up to rounding.

        Args:
            prompts: B prompts, at least one; any script, used unchanged.
            chi: whether the instruction precedes them (not for null and negative prompts).
            trim: cut to the longest prompt, compute no padding and return zeros for it. Not for null and negative
                prompts, whose padding rows are attended.

        Returns:
            embeds (B, L, C) in the encoder's dtype and mask (B, L); L is `model_max_length`, or less with `trim`.
        """
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"encode() needs a list of at least one prompt, not {prompts!r}.")
        instruction = self.chi_prompt if chi else ""
        tokens = tokenize_prompts(
            self.tokenizer, prompts, chi_prompt=instruction, model_max_length=self.model_max_length
        )
        self._warn_of_truncation(prompts, tokens.attention_mask, instruction)
        reuse = self._can_reuse(instruction, tokens.input_ids.shape[1])
        prefix = self._instruction_prefix() if reuse else None
        rows = self._rows_at_once(len(prompts))
        parts = [
            self._encode_rows(PromptTokens(ids, mask, tokens.select_index), prefix, reuse=reuse, trim=trim)
            for ids, mask in zip(tokens.input_ids.split(rows), tokens.attention_mask.split(rows), strict=True)
        ]
        longest = max(part.mask.shape[1] for part in parts)
        return PromptEmbeds.cat([part.resized(longest) for part in parts])

    @torch.no_grad()
    def encode_tokens(self, tokens: PromptTokens, *, trim: bool = False) -> PromptEmbeds:
        """`encode` of prompts that follow the instruction and are tokenised: all rows at once, on any device.

        Args:
            tokens: of B prompts, on the CPU.
            trim: see `encode`.
        """
        reuse = self._can_reuse(self.chi_prompt, tokens.input_ids.shape[1])
        prefix = self._instruction_prefix() if reuse else None
        return self._encode_rows(tokens, prefix, reuse=reuse, trim=trim)

    def _rows_at_once(self, count: int) -> int:
        return 1 if self.device.type == "cpu" else count

    def _encode_rows(self, tokens: PromptTokens, prefix: Prefix | None, *, reuse: bool, trim: bool) -> PromptEmbeds:
        """Encodes rows of tokens together; with `trim` the result is as long as the longest of them."""
        ids, mask, index = tokens
        if not reuse:
            found = self.forward_tokens(ids, mask, index, trim=trim)
        else:
            hidden = encode_after(self.model, prefix, ids, mask, device=self.device, trim=trim)
            kept = to_device(index[index < hidden.shape[1]], self.device)
            found = PromptEmbeds(hidden[:, kept], to_device(mask, self.device)[:, kept])
        if not trim:
            return found
        found = found.resized(int(mask[:, index].sum(dim=1).max()))
        return PromptEmbeds(found.embeds.masked_fill(found.mask[..., None] == 0, 0.0), found.mask)

    def _can_reuse(self, instruction: str, total: int) -> bool:
        """Whether `total` tokens that begin with an instruction may be computed in parts, each once."""
        kept = self.causal and not self.model.training  # layers that are checkpointed in training take no cache
        return bool(instruction) and kept and supports_prefix(self.model.config, total)

    def _instruction_prefix(self) -> Prefix | None:
        """Keys and values of the instruction, kept as long as nothing changes; None where it is too short to pay."""
        key = self.fingerprint()
        if self._prefix is not None and self._prefix[0] == key:
            return self._prefix[1]
        self._prefix = None
        ids = torch.tensor(self.tokenizer.encode(self.chi_prompt), dtype=torch.long)
        if len(ids) < MIN_TOKENS:
            return None
        prefix = compute_prefix(self.model, ids, self.device)
        if key is not None:
            self._prefix = (key, prefix)
        return prefix

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._moves += 1
        self._prefix = None
        return super()._apply(fn, recurse)

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


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; those made in inference mode do not count it."""
    return 0 if tensor.is_inference() else tensor._version
