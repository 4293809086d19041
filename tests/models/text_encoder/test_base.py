"""The encoder on a tiny Gemma-2: batches, training, trimming, null captions, warnings. Numbers are in tests/parity."""

import pytest
import torch

from sana.models.text_encoder import CHI_PROMPT, PromptEmbeds, TextEncoder, load_text_encoder, tokenize_prompts
from tests.parity.common import DEFAULT_FOLDER

TEXT = DEFAULT_FOLDER / "text"
PROMPTS = ["a cat", "", "a very long description of mountains and rivers", "雪山日出", "🚀"]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return load_text_encoder(
        TEXT / "tiny_gemma2", tokenizer_path=TEXT / "tiny_tokenizer", model_max_length=24, chi_prompt=CHI_PROMPT
    )


def test_a_prompt_of_a_batch_equals_its_single_run(encoder: TextEncoder) -> None:
    together = encoder.encode(PROMPTS)
    assert together.embeds.shape == (5, 24, encoder.hidden_size) and together.mask.shape == (5, 24)
    for index, prompt in enumerate(PROMPTS):
        alone = encoder.encode([prompt])
        assert torch.equal(alone.embeds[0], together.embeds[index])
        assert torch.equal(alone.mask[0], together.mask[index])


def test_the_instruction_changes_prompts_and_not_null_captions(encoder: TextEncoder) -> None:
    bare = TextEncoder(encoder.model, encoder.tokenizer, model_max_length=24)
    assert not torch.allclose(encoder.encode(["a cat"]).embeds, bare.encode(["a cat"]).embeds, atol=1e-2)
    for negatives in (None, ["", "blurry"]):
        assert torch.equal(encoder.encode_null(negatives).embeds, bare.encode_null(negatives).embeds)
    assert len(encoder.encode_null()) == 1
    assert torch.equal(encoder.encode(["a cat"], chi=False).embeds, bare.encode(["a cat"]).embeds)


def test_padding_rows_of_the_null_caption_are_not_zero(encoder: TextEncoder) -> None:
    null = encoder.encode_null()
    assert null.mask.sum() == 1
    assert null.embeds[0, 1:].abs().amax(dim=-1).min() > 0.1  # a prompt's mask lets them be attended


@pytest.mark.parametrize("chi", [CHI_PROMPT, ()])
def test_trimming_keeps_real_tokens(encoder: TextEncoder, chi: tuple[str, ...]) -> None:
    tokens = tokenize_prompts(encoder.tokenizer, PROMPTS[:2], chi_prompt=chi, model_max_length=24)
    with torch.no_grad():
        whole, trimmed = encoder.forward_tokens(*tokens), encoder.forward_tokens(*tokens, trim=True)
    real = whole.mask.bool()
    torch.testing.assert_close(trimmed.embeds[real], whole.embeds[real], rtol=1e-5, atol=1e-5)
    assert torch.equal(trimmed.mask, whole.mask)
    assert (trimmed.embeds[:, -8:] == 0).all()


def test_gradients_reach_every_weight_through_tokens_and_none_through_encode(encoder: TextEncoder) -> None:
    tokens = tokenize_prompts(encoder.tokenizer, PROMPTS, model_max_length=24)
    encoder.forward_tokens(*tokens, trim=True).embeds.sum().backward()
    without = [name for name, weight in encoder.model.named_parameters() if weight.grad is None]
    encoder.zero_grad()
    assert without == []
    assert not encoder.encode(["a cat"]).embeds.requires_grad


def test_a_long_prompt_warns_and_a_fitting_one_does_not(encoder: TextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    encoder.encode(["a cat"])
    assert caplog.text == ""
    encoder.encode(["a cat", "word " * 60])
    assert "longer than text_encoder.model_max_length=24" in caplog.text
    assert caplog.text.count("WARNING") == 1


@pytest.mark.parametrize("prompts", [[], "a cat"])
def test_what_is_no_list_of_prompts_is_refused(encoder: TextEncoder, prompts: object) -> None:
    with pytest.raises(ValueError, match="list of at least one prompt"):
        encoder.encode(prompts)


def test_embeddings_move_and_only_embeddings_change_dtype() -> None:
    moved = PromptEmbeds(torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.long)).to("cpu", torch.bfloat16)
    assert (moved.embeds.dtype, moved.mask.dtype) == (torch.bfloat16, torch.int64)


def test_embeddings_are_cut_padded_and_trimmed() -> None:
    given = PromptEmbeds(torch.ones(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]))
    assert given.longest() == 2
    longer = given.resized(6)
    assert longer.mask.tolist() == [[1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert torch.equal(longer.embeds[:, :4], given.embeds) and not longer.embeds[:, 4:].any()
    assert torch.equal(longer.resized(4).embeds, given.embeds) and torch.equal(longer.resized(4).mask, given.mask)
    trimmed = given.trimmed()
    assert trimmed.mask.tolist() == [[1, 1], [1, 0]]
    assert trimmed.embeds[..., 0].tolist() == [[1, 1], [1, 0]]
    unmasked = PromptEmbeds(given.embeds, given.mask * torch.tensor([[1], [0]]))  # the second row is read whole
    assert unmasked.longest() == 4
    assert unmasked.trimmed().embeds[..., 0].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_without_an_instruction_prompts_are_trimmed_too(encoder: TextEncoder) -> None:
    bare = TextEncoder(encoder.model, encoder.tokenizer, model_max_length=24)
    full, trimmed = bare.encode(PROMPTS), bare.encode(PROMPTS, trim=True)
    length = int(full.mask.sum(dim=1).max())
    assert trimmed.embeds.shape[1] == length < 24 and torch.equal(trimmed.mask, full.mask[:, :length])
    real = trimmed.mask.bool()
    torch.testing.assert_close(trimmed.embeds[real], full.embeds[:, :length][real], rtol=1e-5, atol=1e-5)
    assert not trimmed.embeds[~real].any()


def test_a_saved_encoder_encodes_the_same(encoder: TextEncoder, tmp_path) -> None:
    encoder.save(tmp_path)
    again = load_text_encoder(tmp_path, model_max_length=24, chi_prompt=CHI_PROMPT)
    assert torch.equal(again.encode(["a cat"]).embeds, encoder.encode(["a cat"]).embeds)
