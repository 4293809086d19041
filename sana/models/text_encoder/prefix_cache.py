"""Keys and values of the instruction, computed once: every prompt begins with its tokens. No tokenizer is here."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sana.utils.transfer import to_device

if TYPE_CHECKING:
    from transformers import DynamicCache

MIN_TOKENS = 16  # a shorter instruction costs less than the call of the network that it would need for itself


@dataclass(frozen=True, eq=False)
class Prefix:
    """What a causal language model computed for the first P tokens of every prompt; never changed by its use."""

    ids: Tensor  # (P,) int64 on the CPU
    hidden: Tensor  # (P, C) last hidden states
    layers: tuple[tuple[Tensor, Tensor], ...]  # keys and values (1, h, P, d) of every layer

    def shared(self, input_ids: Tensor, attention_mask: Tensor) -> int:
        """Returns how many real tokens at the beginning of EVERY row are those of the prefix.

        Tokens are compared, not texts: a tokenizer may merge the instruction's last token with the prompt's first.

        Args:
            input_ids: (B, T) int64 on the CPU.
            attention_mask: (B, T), 1 for real tokens, padded on the right.
        """
        length = min(len(self.ids), input_ids.shape[1])
        equal = (input_ids[:, :length] == self.ids[:length]) & (attention_mask[:, :length] != 0)
        return int(equal.long().cumprod(dim=1).sum(dim=1).min())

    def as_cache(self, rows: int, length: int) -> "DynamicCache":
        """Returns a copy of the first `length` tokens for `rows` rows, which a model may extend."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for index, pair in enumerate(self.layers):
            keys, values = (tensor[:, :, :length].expand(rows, -1, -1, -1) for tensor in pair)
            cache.update(keys, values, index)
        return cache


def supports_prefix(config: Any, total: int) -> bool:
    """Whether what follows does not change the states of first tokens, and all of `total` tokens are remembered.

    Not so for a network that attends in both directions, nor where a layer forgets what is behind its window.
    """
    if getattr(config, "use_bidirectional_attention", None) or not getattr(config, "is_causal", True):
        return False
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) if windowed else None
    return window is None or total <= window


def compute_prefix(model: Any, ids: Tensor, device: torch.device) -> Prefix:
    """Runs a causal transformers model on the tokens (P,) of the instruction."""
    from transformers import DynamicCache

    cache = DynamicCache()
    hidden = _extend(model, cache, ids[None].to(device), torch.ones_like(ids)[None].to(device), 0, len(ids))
    layers: Any = cache.layers  # of keys and values, whatever kinds of layers transformers knows besides
    return Prefix(ids.cpu(), hidden[0], tuple((layer.keys, layer.values) for layer in layers))


def encode_after(
    model: Any, prefix: Prefix | None, input_ids: Tensor, attention_mask: Tensor, *, device: torch.device, trim: bool
) -> Tensor:
    """Returns the last hidden states of prompts without computing the tokens that they share with the prefix.

    Real tokens are computed in one call and padding in another, so that both forms have the same bits.

    Args:
        model: a causal transformers model.
        prefix: what it computed for the instruction, see `compute_prefix`; None where nothing is kept.
        input_ids: (B, T) int64 on the CPU, padded on the right.
        attention_mask: (B, T).
        device: of the model.
        trim: leave out the columns that are padding in every row.

    Returns:
        (B, T', C), T' = T or with `trim` the length of the longest row.
    """
    from transformers import DynamicCache

    rows, total = input_ids.shape
    shared = prefix.shared(input_ids, attention_mask) if prefix is not None else 0
    longest = int(attention_mask.sum(dim=1).max())
    ids, mask = (to_device(one, device) for one in (input_ids, attention_mask))
    cache, parts = DynamicCache(), []
    if prefix is not None and shared:
        cache = prefix.as_cache(rows, shared)
        parts.append(prefix.hidden[:shared].expand(rows, -1, -1))
    for start, stop in ((shared, longest), (longest, longest if trim else total)):
        if start < stop:
            parts.append(_extend(model, cache, ids, mask, start, stop))
    return torch.cat(parts, dim=1)


def _extend(model: Any, cache: "DynamicCache", ids: Tensor, mask: Tensor, start: int, stop: int) -> Tensor:
    """Hidden states (B, stop - start, C) of columns `start` to `stop`; the cache holds those before, and then these."""
    return model(
        input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True
    ).last_hidden_state
