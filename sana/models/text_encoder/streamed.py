"""A text encoder's network without weights, and its weights one by one out of its files. Nothing is loaded here."""

import json
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sana.models.text_encoder.base import TextEncoder, TextEncoderError
from sana.utils import hub


class StoredTensors(MutableMapping[str, Tensor]):
    """Tensors of safetensors files, read when they are asked for; the files are memory-mapped.

    Args:
        files: one, or all shards.

    Raises:
        TextEncoderError: a file is damaged.
    """

    def __init__(self, files: list[Path]) -> None:
        self._where: dict[str, Any] = {}
        self.metadata: dict[str, str] = {}
        for file in files:
            try:
                opened = safe_open(file, framework="pt")
                self.metadata |= opened.metadata() or {}
                self._where |= {_network_key(key): (opened, key) for key in opened.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise TextEncoderError(f"{file} is damaged or cut short ({error}); fetch it again.") from error
        for key in [key for key in self._where if key.startswith("lm_head.")]:  # what predicts words is not used
            del self._where[key]

    def __getitem__(self, key: str) -> Tensor:
        opened, name = self._where[key]
        return opened.get_tensor(name)

    def __setitem__(self, key: str, value: Tensor) -> None:
        raise TypeError("The tensors of a file are not changed.")

    def __delitem__(self, key: str) -> None:
        del self._where[key]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._where))

    def __len__(self) -> int:
        return len(self._where)


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a folder in transformers' layout; none where it has another format."""
    variant = hub.only_variant(folder)
    suffix = f".{variant}" if variant else ""
    single, index = folder / f"model{suffix}.safetensors", folder / f"model.safetensors.index{suffix}.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TextEncoderError(f"{index} is no index of weight shards ({error}); fetch it again.") from error
    missing = [name for name in shards if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise TextEncoderError(f"{index} names {missing[0]}, which is not there: fetch the whole folder again.")
    return [folder / name for name in shards]


def empty_network(encoder_class: type[TextEncoder], folder: Path, dtype: torch.dtype) -> nn.Module:
    """Builds the network of a folder's config.json with parameters on the meta device.

    Tables that no file holds, such as rotary frequencies, have their values, on the CPU.

    Args:
        encoder_class: which attention it runs with.
        folder: in transformers' layout.
        dtype: of the parameters.
    """
    from transformers import AutoConfig, AutoModel, T5EncoderModel

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    config.dtype = dtype  # tables without a dtype of their own take it
    config._attn_implementation = encoder_class.attention
    with torch.device("meta"):
        if config.model_type == "t5":
            model: Any = T5EncoderModel(config).to(dtype)
        else:
            model = AutoModel.from_config(config)
    persistent = model.state_dict().keys()
    for name, module in model.named_modules():
        tables = [key for key in module._buffers if f"{name}.{key}".removeprefix(".") not in persistent]
        for key in tables:
            module._buffers[key] = torch.empty_like(module._buffers[key], device="cpu")
        if tables:
            model._init_weights(module)  # transformers' own way to fill them after a load; meta tensors stay empty
    return model.eval().requires_grad_(False)


def _network_key(key: str) -> str:
    """The key of a tensor in the network without a language model head."""
    return key.removeprefix("model.")
