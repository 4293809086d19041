"""Tiny random encoders of every causal kind, and a record of what their networks are called with. No test is here."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from tokenizers import processors
from transformers import Gemma2Config, Gemma2Model, GemmaConfig, GemmaModel, Qwen2Config, Qwen2Model

from sana.models.text_encoder import PromptEmbeds, TextEncoder, tokenize_prompts
from sana.models.text_encoder.tiny import train_tokenizer

CHI = ["Enhance what the user asks for: a cat -> a white cat on a mat.", "User Prompt: "]
PROMPTS = ["a red cat", "", "two owls on a blue mat beside a very old house", "雪山日出 🚀"]
KINDS = {"gemma": (GemmaConfig, GemmaModel), "gemma2": (Gemma2Config, Gemma2Model), "qwen2": (Qwen2Config, Qwen2Model)}
SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip


def random_encoder(
    kind: str = "gemma2", *, chi: Sequence[str] = CHI, length: int = 40, special: str = "<bos> $A", **config
) -> TextEncoder:
    """A frozen encoder in eval mode.

    Args:
        kind: a key of `KINDS`.
        chi: its instruction.
        length: L.
        special: what the tokenizer puts around a text ($A).
        **config: changed fields of the network's config.
    """
    tokenizer = train_tokenizer([*CHI, "a white cat", "house on a mat", "pictures of owls"] * 5, 420)
    known = [(token, index) for token, index in (("<bos>", 2), ("<eos>", 1)) if token in special]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=special, special_tokens=known)
    config_class, model_class = KINDS[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**SHAPE | {"vocab_size": len(tokenizer)} | config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # attention that attends; the default is nearly uniform
    return TextEncoder(model, tokenizer, model_max_length=length, chi_prompt=chi).eval().requires_grad_(False)


def whole(encoder: TextEncoder, prompts: Sequence[str]) -> PromptEmbeds:
    """Everything computed in one call of the network, as training and the first release of this code do."""
    tokens = tokenize_prompts(
        encoder.tokenizer, prompts, chi_prompt=encoder.chi_prompt, model_max_length=encoder.model_max_length
    )
    with torch.no_grad():
        return encoder.forward_tokens(*tokens)


@contextmanager
def recorded_columns(encoder: TextEncoder) -> Iterator[list[tuple[int, int]]]:
    """Gives the list of (rows, columns) of tokens that every call of the network gets."""
    calls: list[tuple[int, int]] = []
    hook = encoder.model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield calls
    finally:
        hook.remove()
