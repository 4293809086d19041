"""Prompt embeddings in a `.safetensors` file, so that pictures need no text encoder. Nothing is encoded here."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sana.models.text_encoder.base import PromptEmbeds, TextEncoder, TextEncoderError
from sana.models.text_encoder.chi import chi_text

FORMAT = "sana-prompt-embeds-1"


class PrecomputedTextEncoder:
    """Answers `encode` and `encode_null` from a table; it has no network, and knows only the prompts it was given.

    Args:
        prompts: prompt -> embeds (L, C) and mask (L,), encoded with the instruction.
        negative_prompts: the same for prompts encoded without it; "" is the null caption.
        name: of the encoder that made them.
        chi_prompt: the instruction they were made with, "" for none.
        source: the file, for messages.
    """

    def __init__(
        self,
        prompts: Mapping[str, tuple[Tensor, Tensor]],
        negative_prompts: Mapping[str, tuple[Tensor, Tensor]],
        *,
        name: str = "",
        chi_prompt: str = "",
        source: str = "these embeddings",
    ) -> None:
        self._tables = {True: dict(prompts), False: dict(negative_prompts)}
        self.name = name
        self.chi_prompt = chi_prompt
        self.source = source
        first = next((table[prompt][0] for table in self._tables.values() for prompt in table), None)
        if first is None:
            raise TextEncoderError(f"{source} holds no embeddings.")
        self.model_max_length, self.hidden_size = first.shape
        self.device, self.dtype = first.device, first.dtype

    @property
    def prompts(self) -> list[str]:
        """The prompts that can be asked for."""
        return list(self._tables[True])

    def fingerprint(self) -> tuple[Any, ...]:
        """Returns what decides the embeddings of a text besides the text; see `TextEncoder.fingerprint`."""
        return id(self._tables), self.device, self.dtype

    def encode(self, prompts: Sequence[str], *, chi: bool = True, trim: bool = False) -> PromptEmbeds:
        """Looks prompts up; see `TextEncoder.encode`.

        Raises:
            TextEncoderError: a prompt is not in the file.
        """
        table = self._tables[chi]
        for prompt in prompts:
            if prompt not in table:
                kind = "prompt" if chi else "negative prompt"
                raise TextEncoderError(
                    f"The {kind} {prompt!r} is not among the {len(table)} of {self.source}: "
                    "encode it with save_prompt_embeds, or give a text encoder instead of the file."
                )
        rows = [table[prompt] for prompt in prompts]
        found = PromptEmbeds(torch.stack([embeds for embeds, _ in rows]), torch.stack([mask for _, mask in rows]))
        return found.trimmed() if trim else found

    def encode_null(self, negative_prompts: Sequence[str] | None = None) -> PromptEmbeds:
        """Looks up what guidance steers away from; see `TextEncoder.encode_null`."""
        return self.encode([""] if negative_prompts is None else negative_prompts, chi=False)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the embeddings by prompt, so that a hash of the weights covers them."""
        return {
            f"{'prompt' if chi else 'negative'}.{prompt}": embeds
            for chi, table in self._tables.items()
            for prompt, (embeds, _) in table.items()
        }

    def require(self, *, model_max_length: int, chi_prompt: str | Sequence[str | None] | None) -> None:
        """Checks that the file was made for these settings.

        Raises:
            TextEncoderError: another length or instruction; both are named.
        """
        if model_max_length != self.model_max_length:
            raise TextEncoderError(
                f"{self.source} holds {self.model_max_length} tokens a prompt; text_encoder.model_max_length is "
                f"{model_max_length}."
            )
        if chi_text(chi_prompt) != self.chi_prompt:
            raise TextEncoderError(
                f"{self.source} was made with the instruction {self.chi_prompt[:40]!r}; text_encoder.chi_prompt begins "
                f"with {chi_text(chi_prompt)[:40]!r}."
            )

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> "PrecomputedTextEncoder":
        """Moves the embeddings in place and returns this object, as a module's `to` does."""
        for table in self._tables.values():
            for prompt, (embeds, mask) in table.items():
                table[prompt] = (embeds.to(device=device, dtype=dtype), mask.to(device=device))
        self.device, self.dtype = next(
            (embeds.device, embeds.dtype) for table in self._tables.values() for embeds, _ in table.values()
        )
        return self


def save_prompt_embeds(
    path: str | Path,
    prompts: Sequence[str],
    encoder: TextEncoder | PrecomputedTextEncoder,
    *,
    negative_prompts: Sequence[str] = ("",),
) -> None:
    """Encodes prompts and writes them to one file, which appears whole or not at all.

    Args:
        path: the `.safetensors` file; its folder must exist.
        prompts: encoded with the encoder's instruction.
        encoder: what encodes them.
        negative_prompts: encoded without the instruction; keep "" among them for guidance without a negative prompt.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"The file of embeddings must end in .safetensors, not {path.name!r}.")
    unique, unique_negative = list(dict.fromkeys(prompts)), list(dict.fromkeys(negative_prompts))
    if not unique:
        raise ValueError("At least one prompt is needed.")
    tensors = {}
    for key, batch in (("prompt", encoder.encode(unique)), ("negative", _encode_negative(encoder, unique_negative))):
        if batch is not None:
            tensors[f"{key}.embeds"], tensors[f"{key}.mask"] = batch.embeds.cpu().contiguous(), batch.mask.cpu()
    metadata = {
        "format": FORMAT,
        "prompts": json.dumps(unique, ensure_ascii=False),
        "negative_prompts": json.dumps(unique_negative, ensure_ascii=False),
        "text_encoder": encoder.name,
        "chi_prompt": encoder.chi_prompt,
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_prompt_embeds(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> PrecomputedTextEncoder:
    """Reads a file of `save_prompt_embeds`.

    Args:
        path: the file.
        dtype: of the embeddings; None keeps the file's.
        device: where they live.

    Raises:
        TextEncoderError: no such file, or not one of ours; the message names it.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise TextEncoderError(f"{path} is no file of prompt embeddings (format {metadata.get('format')!r}).")
            tables = [
                _read_table(file, key, json.loads(metadata[names]), dtype)
                for key, names in (("prompt", "prompts"), ("negative", "negative_prompts"))
            ]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise TextEncoderError(f"The file of prompt embeddings {path} cannot be read: {error}.") from error
    return PrecomputedTextEncoder(
        *tables, name=metadata.get("text_encoder", ""), chi_prompt=metadata.get("chi_prompt", ""), source=str(path)
    )


def _encode_negative(encoder: TextEncoder | PrecomputedTextEncoder, prompts: list[str]) -> PromptEmbeds | None:
    return encoder.encode_null(prompts) if prompts else None


def _read_table(
    file: safe_open, key: str, prompts: list[str], dtype: torch.dtype | None
) -> dict[str, tuple[Tensor, Tensor]]:
    if not prompts:
        return {}
    embeds, mask = file.get_tensor(f"{key}.embeds").to(dtype=dtype), file.get_tensor(f"{key}.mask")
    if not len(prompts) == len(embeds) == len(mask):
        raise ValueError(f"{len(prompts)} {key}s but {len(embeds)} embeddings")
    return dict(zip(prompts, zip(embeds, mask, strict=True), strict=True))
