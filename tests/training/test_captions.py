"""Training sees the embeddings that the pipeline's text encoder makes."""

import pytest
import torch

from sana.models.text_encoder import load_text_encoder
from sana.training.captions import CaptionEncoder

CHI = ["Draw this picture.", ""]


@pytest.fixture
def both(text_folder):
    encoder = load_text_encoder(str(text_folder), dtype=torch.float32, model_max_length=24, chi_prompt=CHI)
    return encoder, CaptionEncoder(encoder.tokenizer, encoder.model, CHI, 24)


def test_readable_tokens_equal_those_of_inference(both):
    encoder, training = both
    captions = ["a red cat", "two owls on a blue background"]
    embeds, mask = training(captions, torch.zeros(2, dtype=torch.bool))
    expected = encoder.encode(captions)
    length = mask.shape[1]
    assert torch.equal(mask, expected.mask[:, :length])
    assert expected.mask[:, length:].sum() == 0
    difference = (embeds - expected.embeds[:, :length]) * mask[..., None]
    assert difference.abs().max() < 1e-5


def test_a_dropped_caption_is_the_null_caption_under_its_own_mask(both):
    encoder, training = both
    captions = ["a red cat", "two owls on a blue background"]
    embeds, mask = training(captions, torch.tensor([True, False]))
    null = encoder.encode([""], chi=False).embeds[0, : mask.shape[1]]
    torch.testing.assert_close(embeds[0], null, atol=1e-5, rtol=1e-5)
    _, undropped = training(captions, torch.tensor([False, False]))
    assert torch.equal(mask, undropped)


def test_gradients_reach_the_text_encoder(both):
    _, training = both
    training(["a red cat"], torch.tensor([False]))[0].square().sum().backward()
    assert training.model.embed_tokens.weight.grad.abs().sum() > 0
