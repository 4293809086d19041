"""Captions in training: the same features as the pipeline's prompts, whatever else is in the batch."""

import torch

from sana.models.text_encoder import load_text_encoder
from sana.models.text_encoder.precomputed import save_prompt_embeds
from sana.training.text import embed_captions

CAPTIONS = ["a red cat", "two owls on a blue background and a red cat", "a"]


def test_features_of_real_tokens_are_those_of_the_pipeline(text_folder):
    encoder = load_text_encoder(str(text_folder), model_max_length=24, chi_prompt=["Draw this picture.", ""])
    expected = encoder.encode(CAPTIONS)
    embeds, mask = embed_captions(encoder, CAPTIONS)
    length = mask.shape[1]  # the longest caption, and no more
    assert length == expected.mask.sum(dim=1).max() < expected.mask.shape[1]
    assert torch.equal(mask, expected.mask[:, :length]) and embeds.shape[:2] == mask.shape
    real = mask.bool()
    torch.testing.assert_close(embeds[real], expected.embeds[:, :length][real], rtol=1e-5, atol=1e-6)
    assert not embeds[~real].any()
    assert not embeds.requires_grad


def test_a_file_of_embeddings_serves_as_well(text_folder, tmp_path):
    encoder = load_text_encoder(str(text_folder), model_max_length=24, chi_prompt=[])
    save_prompt_embeds(tmp_path / "prompts.safetensors", CAPTIONS, encoder)
    stored = load_text_encoder(str(tmp_path / "prompts.safetensors"), model_max_length=24, chi_prompt=[])
    embeds, mask = embed_captions(stored, CAPTIONS[:2])
    expected = encoder.encode(CAPTIONS[:2])
    assert torch.equal(mask, expected.mask)
    torch.testing.assert_close(embeds, expected.embeds)
