"""Sampling with prepared texts and times gives the numbers of the plain forward."""

import pytest
import torch

from sana.models.transformer.attention import set_fp32_attention
from sana.models.transformer.caches import join_times
from sana.models.transformer.controlnet import SanaMSControlNet
from sana.models.transformer.sana_cm import SanaMSCM
from tests.models.transformer.networks import inputs, small
from tests.tolerance import assert_rms_close

KINDS = [
    {},
    {"qk_norm": True, "cross_norm": True, "cross_attn_type": "vanilla"},
    {"attn_type": "flash", "qk_norm": True, "ffn_type": "dwmlp"},
    {"use_pe": True, "pos_embed_type": "3d_rope", "ffn_type": "mbconvpreglu"},
    {"use_pe": True, "patch_size": 2, "ffn_type": "glumbconv_dilate", "y_norm": True},
]


def at_one_time(batch, value=313.0):
    return {**batch, "timestep": torch.full_like(batch["timestep"], value)}


@pytest.mark.parametrize("changes", KINDS)
@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("fp32", [True, False])
def test_prepared_equals_plain(changes, by_row, fp32):
    model, batch = small(**changes), at_one_time(inputs(3, lengths=[3, 6, 1]))
    set_fp32_attention(model, fp32)
    with torch.no_grad():
        expected = model(**batch)
        text = model.cache_text(batch["y"], batch["mask"], batch_invariant=by_row)
        times = model.cache_time(torch.tensor([900.0, 313.0]))
        assert_rms_close(model.denoise(batch["x"], times[1], text), expected)
        assert_rms_close(model(batch["x"], times[1], text), expected)


def test_texts_without_a_mask_and_with_an_empty_one_are_read_whole():
    model, batch = small(), at_one_time(inputs(2))
    with torch.no_grad():
        time = model.cache_time(batch["timestep"][:1])[0]
        batch["mask"] = None
        expected = model(**batch)
        for mask in (None, torch.zeros(2, batch["y"].shape[-2])):
            assert_rms_close(model.denoise(batch["x"], time, model.cache_text(batch["y"], mask)), expected)


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("pag_rows", [1, 2, 5, 6])
def test_perturbed_rows(by_row, pag_rows):
    model, batch = small(), at_one_time(inputs(6, lengths=[3, 6, 1, 2, 5, 4]))
    with torch.no_grad():
        expected = model(**batch, pag_layers=(1,), pag_rows=pag_rows)
        text = model.cache_text(batch["y"], batch["mask"], batch_invariant=by_row)
        time = model.cache_time(batch["timestep"][:1])[0]
        assert_rms_close(model.denoise(batch["x"], time, text, pag_layers=(1,), pag_rows=pag_rows), expected)
        assert not torch.allclose(expected, model(**batch))


def test_rows_are_independent_bitwise():
    model, batch = small(), at_one_time(inputs(4, lengths=[3, 6, 1, 2]))
    with torch.no_grad():
        time = model.cache_time(batch["timestep"][:1])[0]
        together = model.denoise(batch["x"], time, model.cache_text(batch["y"], batch["mask"]))
        for row in range(4):
            rows = slice(row, row + 1)
            alone = model.denoise(batch["x"][rows], time, model.cache_text(batch["y"][rows], batch["mask"][rows]))
            assert torch.equal(alone, together[rows])


def test_hidden_tokens_are_not_even_projected():
    model, batch = small(), at_one_time(inputs(1, lengths=[3]))
    with torch.no_grad():
        text = model.cache_text(batch["y"], batch["mask"])
        assert [key.shape[2] for key, _ in text.parts[0].key_values] == [3] * len(model.blocks)
        assert text.parts[0].mask is None
        kept = model.cache_text(batch["y"], batch["mask"], batch_invariant=False)
        assert kept.parts[0].mask is not None and kept.parts[0].key_values[0][0].shape[2] == batch["y"].shape[-2]


def test_texts_and_latents_must_have_the_same_rows():
    model, batch = small(), inputs(2)
    text, time = model.cache_text(batch["y"]), model.cache_time(batch["timestep"])[0]
    with pytest.raises(ValueError, match="3 rows and texts of 2"):
        model.denoise(torch.cat([batch["x"], batch["x"][:1]]), time, text)


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("changes", KINDS)
def test_every_row_may_have_a_time_of_its_own(changes, by_row):
    model, batch = small(**changes), inputs(3, lengths=[3, 6, 1])
    batch["timestep"] = torch.tensor([900.0, 313.0, 900.0])
    with torch.no_grad():
        text = model.cache_text(batch["y"], batch["mask"], batch_invariant=by_row)
        times = join_times(model.cache_time(torch.tensor([313.0, 900.0])), [1, 0, 1])
        assert times.blocks.shape[:2] == (len(model.blocks), 3) and len(times.time) == 3
        assert_rms_close(model(batch["x"], times, text), model(**batch))


def test_rows_that_share_a_time_have_the_bits_of_a_shared_one():
    model, batch = small(), inputs(3, lengths=[3, 6, 1])
    with torch.no_grad():
        text = model.cache_text(batch["y"], batch["mask"])
        time = model.cache_time(torch.tensor([313.0]))[0]
        assert torch.equal(model(batch["x"], join_times([time], [0, 0, 0]), text), model(batch["x"], time, text))


@pytest.mark.parametrize("kind", [SanaMSControlNet, SanaMSCM])
def test_networks_with_other_inputs_refuse(kind):
    with pytest.raises(ValueError, match=f"{kind.__name__} is sampled with forward"):
        small(kind).cache_text(inputs(1)["y"])


@pytest.mark.parametrize("pag", [False, True])
def test_branches_of_an_image_together(pag):
    """Each image has its bits whatever stands beside it, and nearly those of its rows alone."""
    branches = 3 if pag else 2
    model, batch = small(), at_one_time(inputs(3, lengths=[3, 6, 1]))
    batch = {name: value.repeat(branches, *[1] * (value.dim() - 1)) for name, value in batch.items()}
    options = {"pag_layers": (1,), "pag_rows": 3} if pag else {}
    with torch.no_grad():
        time = model.cache_time(batch["timestep"][:1])[0]
        text = model.cache_text(batch["y"], batch["mask"], branches=branches)
        assert [part.rows for part in text.parts] == [tuple(range(i, 3 * branches, 3)) for i in range(3)]
        together = model.denoise(batch["x"], time, text, **options)
        assert_rms_close(together, model(**batch, **options))
        for image in range(3):
            own = {name: value[image::3] for name, value in batch.items()}
            alone = model.cache_text(own["y"], own["mask"], branches=branches)
            options = {"pag_layers": (1,), "pag_rows": 1} if pag else {}
            assert torch.equal(model.denoise(own["x"], time, alone, **options), together[image::3])
    with pytest.raises(ValueError, match="4 branches"):
        model.cache_text(batch["y"], branches=4)
