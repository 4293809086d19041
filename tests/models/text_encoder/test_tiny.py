"""The small text encoder: its tokenizer is lossless and marks both ends; transformers loads the folder."""

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from sana.models.text_encoder.tiny import create_text_encoder


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    torch.manual_seed(0)
    captions = ["a red cat", "two owls on a blue background"] * 20
    create_text_encoder(folder, captions, vocab_size=420, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
    return folder


@pytest.fixture
def tokenizer(text_folder):
    return AutoTokenizer.from_pretrained(text_folder)


@pytest.mark.parametrize("text", ["a red cat", "  two  spaces ", "雪山日出", "🌸🚀 frog", "naïve Ünïcode\nline"])
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_texts_begin_with_bos_and_end_with_eos(tokenizer):
    assert tokenizer("").input_ids == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    ids = tokenizer("two owls").input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id


def test_frequent_words_are_one_token(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer("a red cat").input_ids)[1:-1] == ["a", "▁red", "▁cat"]


def test_the_model_is_a_gemma2_with_that_vocabulary(text_folder, tokenizer):
    model = AutoModel.from_pretrained(text_folder)
    assert model.config.model_type == "gemma2"
    assert model.config.vocab_size == len(tokenizer)
