"""Embeddings of patches, times and captions."""

import pytest
import torch

from sana.models.transformer.embedding import CaptionEmbedder, PatchEmbed, timestep_embedding


def test_a_token_sees_its_own_patch_in_row_major_order() -> None:
    embed = PatchEmbed(2, 3, 5)
    latents = torch.randn(2, 3, 4, 6)
    patch = latents[1, :, 2:4, 2:4]  # second row of patches, second column: token 1 * 3 + 1
    expected = embed.proj.weight.flatten(1) @ patch.flatten() + embed.proj.bias
    torch.testing.assert_close(embed(latents)[1, 4], expected)


def test_an_odd_kernel_keeps_the_grid() -> None:
    assert PatchEmbed(1, 4, 8, kernel_size=3)(torch.zeros(1, 4, 5, 7)).shape == (1, 35, 8)


def test_timestep_features() -> None:
    angles = torch.tensor([[2.5, 2.5 / 100]])
    torch.testing.assert_close(
        timestep_embedding(torch.tensor([2.5]), 4), torch.cat([angles.cos(), angles.sin()], dim=1)
    )
    assert timestep_embedding(torch.tensor([1, 2]), 7).shape == (2, 7)
    assert timestep_embedding(torch.tensor([1, 2]), 7)[:, -1].eq(0).all()


def test_caption_dropout_has_its_rate_and_uses_the_cpu_generator() -> None:
    embedder = CaptionEmbedder(3, 4, dropout=0.3, num_tokens=2)
    captions = torch.ones(2000, 1, 2, 3)
    torch.manual_seed(11)
    dropped = (embedder.drop(captions) == embedder.y_embedding).all(dim=(1, 2, 3))
    torch.manual_seed(11)
    assert torch.equal(dropped, torch.rand(2000) < 0.3)
    assert 0.25 < dropped.float().mean() < 0.35


def test_forced_choice() -> None:
    embedder = CaptionEmbedder(3, 4, dropout=0.0, num_tokens=5)
    captions = torch.randn(2, 1, 5, 3)
    out = embedder(captions, force_drop_ids=torch.tensor([0, 1]))
    torch.testing.assert_close(out[0], embedder(captions)[0])
    torch.testing.assert_close(out[1, 0], embedder.y_proj(embedder.y_embedding))


def test_without_dropout_captions_may_have_any_length() -> None:
    embedder = CaptionEmbedder(3, 4, dropout=0.0, num_tokens=5)
    assert embedder(torch.randn(1, 1, 8, 3), train=True).shape == (1, 1, 8, 4)
    with pytest.raises(ValueError, match="model_max_length"):
        CaptionEmbedder(3, 4, dropout=0.1, num_tokens=5)(torch.randn(1, 1, 8, 3), train=True)
