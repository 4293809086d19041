"""Text features that a pipeline keeps between calls, the least recently used go first, and batches made of them."""

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sana.models.text_encoder.base import PromptEmbeds, TextEncoder
from sana.models.text_encoder.precomputed import PrecomputedTextEncoder
from sana.pipelines.denoise import NonFiniteError

NULL_CAPTION = ("", True)
CUDA_LENGTHS = 64  # prompts are padded to a multiple of this on CUDA, so that few shapes occur


class Feature(NamedTuple):
    """What one text became: a prompt up to its last real token, a null or negative caption in full length."""

    embeds: Tensor  # (l, C) on the pipeline's device
    mask: Tensor  # (l,) int64 on the CPU

    @property
    def nbytes(self) -> int:
        return self.embeds.nbytes + self.mask.nbytes


class TextFeatures:
    """Remembers features of texts. All of them are forgotten as soon as the encoder or one of its settings differs.

    The null caption stays whatever the bounds are. An encoder whose weights may learn (a parameter requires a
    gradient) is asked every time.

    Args:
        size: number of texts, besides the null caption; 0 keeps nothing, not even that.
        max_bytes: memory of those texts.
    """

    def __init__(self, size: int = 64, max_bytes: int = 128 * 2**20) -> None:
        self.max_bytes = max_bytes
        self._size = 0
        self._known: OrderedDict[tuple[str, bool], Feature] = OrderedDict()
        self._encoder: weakref.ref[Any] | None = None
        self._made_for: tuple[Any, ...] | None = None
        self.size = size

    @property
    def size(self) -> int:
        """Number of texts that are kept at most."""
        return self._size

    @size.setter
    def size(self, size: int) -> None:
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ValueError(f"The number of texts to keep must be 0 or a positive whole number, not {size!r}.")
        self._size = size
        self._drop_oldest()

    @property
    def nbytes(self) -> int:
        """Memory of the features that the bounds count."""
        return sum(feature.nbytes for text, feature in self._known.items() if text != NULL_CAPTION)

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, text: tuple[str, bool]) -> bool:
        return text in self._known

    def clear(self) -> None:
        """Forgets everything."""
        self._known.clear()
        self._encoder = self._made_for = None

    def find(
        self,
        encoder: TextEncoder | PrecomputedTextEncoder,
        prompts: Sequence[str],
        *,
        null: bool = False,
        device: torch.device,
    ) -> list[Feature]:
        """Returns the features of texts, and encodes those that are not known, each text once.

        Args:
            encoder: of the texts.
            prompts: P texts; any may occur twice.
            null: encode them as negative prompts: without the instruction, and in full length, since the mask of
                another prompt decides which of their tokens are read.
            device: where the features are wanted.

        Raises:
            NonFiniteError: the text encoder produced infinity or NaN.
        """
        keep = self._keep_for(encoder, device)
        found = {text: self._known[text, null] for text in prompts if keep and (text, null) in self._known}
        new = [text for text in dict.fromkeys(prompts) if text not in found]
        if new:
            found |= zip(new, _encode(encoder, new, null, device), strict=True)
        if keep:
            for text in dict.fromkeys(prompts):
                self._known[text, null] = found[text]
                self._known.move_to_end((text, null))
            self._drop_oldest()
        return [found[text] for text in prompts]

    def _keep_for(self, encoder: TextEncoder | PrecomputedTextEncoder, device: torch.device) -> bool:
        """Forgets what another encoder or other settings made; returns whether anything may be kept at all."""
        settings = encoder.fingerprint()
        if self._encoder is None or self._encoder() is not encoder or self._made_for != (settings, device):
            self.clear()
        if settings is None or not self.size:
            return False
        self._encoder, self._made_for = weakref.ref(encoder), (settings, device)
        return True

    def _drop_oldest(self) -> None:
        if not self.size:
            return self.clear()
        counted = [text for text in self._known if text != NULL_CAPTION]
        spare, used = len(counted) - self.size, self.nbytes
        for index, text in enumerate(counted):
            if index >= spare and used <= self.max_bytes:
                break
            used -= self._known.pop(text).nbytes


def stack(features: Sequence[Feature], length: int) -> PromptEmbeds:
    """Returns new tensors (P, length, C) and (P, length) on the features' device, zero where a feature is shorter."""
    first = features[0].embeds
    embeds = first.new_zeros(len(features), length, first.shape[1])
    mask = torch.zeros(len(features), length, dtype=torch.int64)
    for row, feature in enumerate(features):
        embeds[row, : len(feature.mask)] = feature.embeds
        mask[row, : len(feature.mask)] = feature.mask
    return PromptEmbeds(embeds, mask.to(first.device))


def call_length(longest: int, limit: int, device: torch.device) -> int:
    """Returns L of one call: the longest prompt, on CUDA rounded up; at most `limit`."""
    step = CUDA_LENGTHS if device.type == "cuda" else 1
    return min(limit, -(-longest // step) * step)


def trim_given(given: PromptEmbeds, device: torch.device) -> PromptEmbeds:
    """Cuts embeddings that a caller brought after the last token that one of their masks lets be read, and moves them.

    Args:
        given: of P prompts, anywhere.
        device: where they are wanted.
    """
    return given.resized(call_length(given.longest(), given.mask.shape[1], device)).to(device)


def _encode(
    encoder: TextEncoder | PrecomputedTextEncoder, texts: list[str], null: bool, device: torch.device
) -> list[Feature]:
    encoded = encoder.encode_null(texts) if null else encoder.encode(texts, chi=True, trim=True)
    if not torch.isfinite(encoded.embeds).all():
        raise NonFiniteError("The text encoder produced values that are not finite; try dtype fp32 or bf16.")
    rows = encoded.embeds.to(device)
    features = []
    for embeds, mask in zip(rows, encoded.mask.cpu(), strict=True):
        length = len(mask) if null or not mask.any() else int(mask.nonzero().max()) + 1
        features.append(Feature(embeds[:length].clone(), mask[:length].clone()))
    return features
