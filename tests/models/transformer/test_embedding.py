"""Embeddings of patches, times and captions."""

import pytest
import torch

from sana.models.transformer.embedding import CaptionEmbedder, PatchEmbed, timestep_embedding, unpatchify


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


def test_unpatchify_puts_every_value_in_its_place() -> None:
    tokens = torch.arange(6 * 12.0).view(1, 6, 12)  # 2 x 3 patches of 2 x 2 pixels with 3 channels
    image = unpatchify(tokens, (2, 3), 2)
    assert image.shape == (1, 3, 4, 6)
    assert image[0, 2, 3, 1] == tokens[0, 3, 3 * (2 * 1 + 1) + 2]  # second row, first column: lower right pixel


@pytest.mark.parametrize("kind", [Sana, SanaMS])
def test_only_sana_insists_on_its_size(kind: type[Sana]) -> None:
    model = small(kind)
    assert model(**inputs(size=(8, 8))).shape == (2, 4, 8, 8)
    if kind is Sana:
        with pytest.raises(ValueError, match="8 x 8 only, not 4 x 6"):
            model(**inputs(size=(4, 6)))


@pytest.mark.parametrize(
    ("changes", "call", "message"),
    [
        ({}, {"x": torch.zeros(2, 3, 4, 6)}, r"\(B, 4, H, W\), not \(2, 3, 4, 6\)"),
        ({"patch_size": 4}, {}, "4 x 6 do not divide into patches of 4"),
        ({}, {"return_logvar": True}, "logvar=True"),
        ({"cfg_embed": True}, {}, r"data_info\['cfg_scale'\]"),
        ({}, {"pag_rows": 3}, "between 0 and the batch size 2, not 3"),
        ({}, {"pag_layers": (8,)}, r"from 0 to 1, not \[8\]"),
    ],
)
def test_calls_that_do_not_fit_are_refused(changes: dict, call: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)(**{**inputs(), **call})


def test_the_position_buffer_is_the_table_of_the_input_size() -> None:
    case = next(
        case for case in load_cases(DEFAULT_FOLDER) if case.constructor.get("use_pe") and case.kind == "dit_forward"
    )
    arguments = {key: value for key, value in case.constructor.items() if key != "class"}
    torch.testing.assert_close(SanaMS(**arguments).pos_embed, case.weights()["pos_embed"], rtol=1e-5, atol=1e-6)
    assert SanaMS(**{**arguments, "use_pe": False}).pos_embed.eq(0).all()


def test_a_fresh_network_is_finite_and_near_zero_output() -> None:
    torch.manual_seed(0)
    model = SanaMS(**SMALL).eval()
    out = model(**inputs())
    assert torch.isfinite(out).all() and 1e-4 < out.std() < 1


@pytest.mark.parametrize("fp32_attention", [True, False])
def test_bfloat16_autocast_trains_with_nearly_the_same_gradients(fp32_attention: bool) -> None:
    gradients = []
    for enabled in (False, True):
        torch.manual_seed(2)
        model = SanaMS(**{**SMALL, "class_dropout_prob": 0.0}).train()
        set_fp32_attention(model, fp32_attention)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = model(**inputs(4))
        (out.float() - inputs(4)["x"]).square().mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    cosine = torch.nn.functional.cosine_similarity(*gradients, dim=0)
    assert cosine > 0.99
