"""Shapes of the official text encoders as published, so that one can be built without its files. Loads no weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sana.models.text_encoder.base import TextEncoder, TextEncoderError
from sana.models.text_encoder.chi import chi_text
from sana.models.text_encoder.load import OFFICIAL_ENCODERS, _load_tokenizer, _split_folder

LETTERS_A_TOKEN = 4  # of English in large vocabularies, as those of Gemma and Qwen
_GEMMA_2B = {
    "model_type": "gemma", "hidden_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 8,
    "num_key_value_heads": 1, "head_dim": 256, "intermediate_size": 16384, "vocab_size": 256000,
}  # fmt: skip
_GEMMA_2_2B = {
    "model_type": "gemma2", "hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256, "intermediate_size": 9216, "vocab_size": 256000,
}  # fmt: skip
_GEMMA_2_9B = {
    "model_type": "gemma2", "hidden_size": 3584, "num_hidden_layers": 42, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 256, "intermediate_size": 14336, "vocab_size": 256000,
}  # fmt: skip
_QWEN2 = {"model_type": "qwen2", "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}
_T5 = {"model_type": "t5", "d_kv": 64, "feed_forward_proj": "gated-gelu", "vocab_size": 32128, "num_layers": 24}

# Official name -> fields of transformers' config. Sources: the config.json of the models named in OFFICIAL_ENCODERS;
# tests/models/text_encoder/test_architectures.py checks every line against the published number of parameters.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gemma-2b": _GEMMA_2B,
    "gemma-2b-it": _GEMMA_2B,
    "gemma-2-2b": _GEMMA_2_2B,
    "gemma-2-2b-it": _GEMMA_2_2B,
    "gemma-2-9b": _GEMMA_2_9B,
    "gemma-2-9b-it": _GEMMA_2_9B,
    "Qwen2-0.5B-Instruct": _QWEN2
    | {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "intermediate_size": 4864},
    "Qwen2-1.5B-Instruct": _QWEN2
    | {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "intermediate_size": 8960},
    "T5": _T5 | {"d_model": 4096, "d_ff": 10240, "num_heads": 64},
    "T5-small": _T5 | {"d_model": 512, "d_ff": 1024, "num_heads": 6, "num_layers": 8},
    "T5-base": _T5 | {"d_model": 768, "d_ff": 2048, "num_heads": 12, "num_layers": 12},
    "T5-large": _T5 | {"d_model": 1024, "d_ff": 2816, "num_heads": 16},
    "T5-xl": _T5 | {"d_model": 2048, "d_ff": 5120, "num_heads": 32},
    "T5-xxl": _T5 | {"d_model": 4096, "d_ff": 10240, "num_heads": 64},
}


def architecture(name_or_path: str | Path) -> dict[str, Any]:
    """Returns the fields of transformers' config of a text encoder, without asking the network.

    Args:
        name_or_path: an official name, its hub id, or a local folder with config.json.

    Raises:
        TextEncoderError: its shape is not known.
    """
    folder = Path(name_or_path).expanduser()
    for file in (folder / "text_encoder" / "config.json", folder / "config.json"):
        if file.is_file():
            return dict(json.loads(file.read_text(encoding="utf-8")))
    hub_ids = {official.hub_id: name for name, official in OFFICIAL_ENCODERS.items()}
    name = str(name_or_path).removeprefix("hf://")
    name = hub_ids.get(name, name)
    if name not in ARCHITECTURES:
        raise TextEncoderError(
            f"The shape of the text encoder {str(name_or_path)!r} is not known: give text_encoder.text_encoder_name a "
            f"local folder, or one of {', '.join(ARCHITECTURES)}."
        )
    return dict(ARCHITECTURES[name])


def encoder_class(name_or_path: str | Path) -> type[TextEncoder]:
    """Returns the class of a text encoder.

    Raises:
        TextEncoderError: its shape is not known, or it is no known kind.
    """
    from sana.models import TEXT_ENCODERS

    kind = architecture(name_or_path).get("model_type")
    if kind not in TEXT_ENCODERS:
        raise TextEncoderError(f"{name_or_path} is a {kind!r} network; known are {', '.join(sorted(TEXT_ENCODERS))}.")
    return TEXT_ENCODERS[kind]


def empty_text_encoder(name_or_path: str | Path) -> nn.Module:
    """Builds the network of a text encoder on the meta device: shapes without weights, with the attention it runs with.

    Args:
        name_or_path: see `architecture`.

    Raises:
        TextEncoderError: its shape is not known, or it is no known kind.
    """
    from transformers import AutoConfig, AutoModel, T5EncoderModel

    kind = encoder_class(name_or_path)
    fields = architecture(name_or_path)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    config._attn_implementation = kind.attention
    with torch.device("meta"):
        model = AutoModel.from_config(config) if kind.uses_chi else T5EncoderModel(config)
    return model.eval().requires_grad_(False)


def instruction_tokens(name_or_path: str | Path, chi_prompt: str | Sequence[str | None] | None) -> int:
    """Returns how many tokens the instruction has: counted where the tokenizer is at hand, else from its letters.

    Args:
        name_or_path: see `architecture`.
        chi_prompt: the instruction, one string or its lines; empty for none.
    """
    text = chi_text(chi_prompt) if encoder_class(name_or_path).uses_chi else ""
    folder = Path(name_or_path).expanduser()
    if not text:
        return 0
    if folder.is_dir():
        return len(_load_tokenizer(_split_folder(folder)[1]).encode(text))
    return len(text) // LETTERS_A_TOKEN
