"""Complex human instruction (CHI, Sana section 3.3): text, token budget, which tokens are kept. Runs no model."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The instruction of the released models; it was trained in, so not a letter may change. Joined by newlines.
CHI_PROMPT = (
    'Given a user prompt, generate an "Enhanced prompt" that provides detailed visual descriptions suitable for image '
    "generation. Evaluate the level of detail in the user prompt:",
    "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial "
    "relationships to create vivid and concrete scenes.",
    "- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating.",
    "Here are examples of how to transform or refine prompts:",
    "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping "
    "peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
    "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street "
    "lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass "
    "skyscrapers.",
    "Please generate only the enhanced description for the prompt below and avoid including any additional commentary "
    "or evaluations:",
    "User Prompt: ",
)


class PromptTokens(NamedTuple):
    """Tokens of a batch of prompts, padded on the right to T tokens, and the L of them that the image model sees."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64, 1 for real tokens
    select_index: Tensor  # (L,) int64, positions in [0, T)


def chi_text(chi_prompt: str | Sequence[str | None] | None) -> str:
    """Returns the instruction as one string: the lines of the config joined by newlines; "" when there is none."""
    if not chi_prompt:
        return ""
    return chi_prompt if isinstance(chi_prompt, str) else "\n".join(line or "" for line in chi_prompt)


def token_budget(tokenizer: Any, chi_prompt: str | Sequence[str | None] | None, model_max_length: int) -> int:
    """Returns T, the number of tokens that instruction, prompt and padding fill together.

    The `- 2` counts the begin token and one token that was expected to merge; it is trained in.
    """
    text = chi_text(chi_prompt)
    return len(tokenizer.encode(text)) + model_max_length - 2 if text else model_max_length


def tokenize_prompts(
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    chi_prompt: str | Sequence[str | None] | None = (),
    model_max_length: int = 300,
) -> PromptTokens:
    """Puts the instruction before every prompt and tokenises them to one length, padded on the right.

    The image model sees the begin token and the last L - 1 tokens: with an instruction, a few of its last tokens are
    inside that window. Prompts are used as they are: nothing is stripped, lowered or normalised.

    Args:
        tokenizer: a transformers tokenizer.
        prompts: B prompts.
        chi_prompt: the instruction, one string or its lines; empty for none (null and negative prompts).
        model_max_length: L, the number of tokens that the image model sees.

    Returns:
        input_ids (B, T), attention_mask (B, T) and select_index (L,), all int64 on the CPU.
    """
    if model_max_length < 2:
        raise ValueError(f"model_max_length must be at least 2, not {model_max_length}.")
    text = chi_text(chi_prompt)
    total = token_budget(tokenizer, text, model_max_length)
    batch = tokenizer(
        [text + prompt for prompt in prompts],
        max_length=total,
        padding="max_length",
        padding_side="right",
        truncation=True,
        return_tensors="pt",
    )
    attention_mask = batch["attention_mask"].long()
    # A tokenizer without a begin token (Qwen2) makes no token of "": attention needs at least one.
    attention_mask[:, 0] = 1
    select_index = torch.tensor([0, *range(total - model_max_length + 1, total)])
    return PromptTokens(batch["input_ids"].long(), attention_mask, select_index)


def count_dropped_tokens(
    tokenizer: Any, prompt: str, *, chi_prompt: str | Sequence[str | None] | None, model_max_length: int
) -> int:
    """Returns how many tokens at the end of a prompt do not fit into the budget (0: the whole prompt is used)."""
    text = chi_text(chi_prompt)
    used = len(tokenizer.encode(text + prompt))
    return max(0, used - token_budget(tokenizer, text, model_max_length))
