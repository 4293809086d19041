"""The instruction, its token budget and the kept tokens, against the recorded tokens and against the definition."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from sana.models.text_encoder.chi import CHI_PROMPT, chi_text, count_dropped_tokens, token_budget, tokenize_prompts
from tests.parity.common import DEFAULT_FOLDER, load_cases

SCRIPTS = ["雪山日出，湖面倒影", "👩‍👩‍👧‍👦 at the 🏖️", "кот и قطة и 猫", "  two  spaces ", "e\u0301te\u0301"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEFAULT_FOLDER / "text/tiny_tokenizer")


def test_the_instruction_is_the_released_one() -> None:
    (case,) = (case for case in load_cases(DEFAULT_FOLDER) if case.name == "text/encode_chi")
    assert list(CHI_PROMPT) == case.call["chi_prompt"]


def test_the_instruction_may_be_text_lines_or_nothing() -> None:
    assert chi_text(["a", "b: "]) == chi_text("a\nb: ") == "a\nb: "
    assert chi_text(None) == chi_text([]) == chi_text("") == ""
    assert chi_text([None, "b"]) == "\nb"


def test_budget_and_window(tokenizer) -> None:
    count = len(tokenizer(chi_text(CHI_PROMPT))["input_ids"])
    tokens = tokenize_prompts(tokenizer, ["a cat", ""], chi_prompt=CHI_PROMPT, model_max_length=30)
    assert tokens.input_ids.shape == tokens.attention_mask.shape == (2, count + 28)
    assert tokens.select_index.tolist() == [0, *range(count - 1, count + 28)]
    assert token_budget(tokenizer, (), 30) == 30
    # the last token of the instruction is inside the window: 1 begin token + this one for an empty prompt
    assert tokens.attention_mask[1][tokens.select_index].sum() == 2


def test_without_an_instruction_every_token_is_kept(tokenizer) -> None:
    tokens = tokenize_prompts(tokenizer, ["a cat"], model_max_length=8)
    assert tokens.select_index.tolist() == list(range(8))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_on_the_right_whatever_the_tokenizer_says(tokenizer, side: str) -> None:
    tokenizer.padding_side = side
    mask = tokenize_prompts(tokenizer, ["a", "a cat on a mat"], model_max_length=12).attention_mask
    assert (mask.diff(dim=1) <= 0).all() and mask[0].sum() < mask[1].sum() < 12


@pytest.mark.parametrize("prompt", SCRIPTS)
def test_every_script_passes_unchanged(tokenizer, prompt: str) -> None:
    tokens = tokenize_prompts(tokenizer, [prompt], model_max_length=120)
    real = tokens.input_ids[0][tokens.attention_mask[0].bool()]
    assert tokenizer.decode(real, skip_special_tokens=True) == prompt
    assert tokenizer.unk_token_id not in real.tolist()


def test_dropped_tokens_are_counted(tokenizer) -> None:
    prompt = "cat " * 40
    for chi in ((), CHI_PROMPT):
        budget = token_budget(tokenizer, chi, 20)
        whole = len(tokenizer(chi_text(chi) + prompt)["input_ids"])
        assert count_dropped_tokens(tokenizer, prompt, chi_prompt=chi, model_max_length=20) == whole - budget > 0
        assert count_dropped_tokens(tokenizer, "cat", chi_prompt=chi, model_max_length=20) == 0
    kept = tokenize_prompts(tokenizer, [prompt], chi_prompt=CHI_PROMPT, model_max_length=20)
    assert kept.attention_mask.all()


def test_a_prompt_without_tokens_keeps_one_visible(tokenizer) -> None:
    class NoBegin:  # as Qwen2's tokenizer: "" has no token at all
        def __call__(self, texts, max_length, **_):
            zeros = torch.zeros(len(texts), max_length, dtype=torch.long)
            return {"input_ids": zeros, "attention_mask": zeros.clone()}

    assert tokenize_prompts(NoBegin(), [""], model_max_length=5).attention_mask.tolist() == [[1, 0, 0, 0, 0]]


def test_an_impossible_length_is_refused(tokenizer) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        tokenize_prompts(tokenizer, ["a"], model_max_length=1)


def test_the_budget_is_written_in_one_place() -> None:
    """The `- 2` of the budget was copied to 13 places once."""
    sources = (Path(__file__).parents[3] / "sana").rglob("*.py")
    assert [path.name for path in sources if "model_max_length - 2" in path.read_text(encoding="utf-8")] == ["chi.py"]
