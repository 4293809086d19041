"""Random draws of a run and the flow objective: independent of batching, distributed as stated, right where known."""

import pytest
import torch
from scipy import stats

from sana.models.transformer.sana import SanaMS
from sana.training.objective import FlowObjective, NoiseOptions, draw

OPTIONS = NoiseOptions(seed=3, drop_probability=0.25)


def tiny_transformer():
    torch.manual_seed(0)
    model = SanaMS(
        input_size=4, in_channels=4, hidden_size=32, depth=1, num_heads=2, linear_head_dim=16, caption_channels=8,
        model_max_length=5, class_dropout_prob=0.1, y_norm=True, pred_sigma=False, learn_sigma=False,
    )  # fmt: skip
    return model.train()


def test_what_a_sample_gets_depends_on_its_place_only():
    together = draw(range(10, 16), (4, 4, 4), OPTIONS)
    for row, position in enumerate(range(10, 16)):
        alone = draw([position], (4, 4, 4), OPTIONS)
        assert torch.equal(together.noise[row], alone.noise[0])
        assert together.index[row] == alone.index[0] and together.dropped[row] == alone.dropped[0]
    assert not torch.equal(together.noise[0], together.noise[1])
    other = draw([10], (4, 4, 4), NoiseOptions(seed=4))
    assert not torch.equal(together.noise[0], other.noise[0])


def test_indices_are_logit_normal_noise_is_normal_and_a_quarter_is_dropped():
    drawn = draw(range(4000), (1, 2, 2), NoiseOptions(seed=0, logit_mean=0.5, logit_std=0.8, drop_probability=0.25))
    normal = torch.special.logit((drawn.index + 0.5).double() / 1000)
    assert stats.kstest(normal.numpy(), stats.norm(0.5, 0.8).cdf).pvalue > 1e-3
    assert stats.kstest(drawn.noise.flatten().numpy(), stats.norm.cdf).pvalue > 1e-3
    assert stats.binomtest(int(drawn.dropped.sum()), 4000, 0.25).pvalue > 1e-3


@pytest.mark.parametrize("scheme", ["uniform", "mode"])
def test_other_schemes_take_effect(scheme):
    drawn = draw(range(3000), (1, 1, 1), NoiseOptions(seed=0, scheme=scheme)).index.double() / 1000
    uniform = stats.kstest(drawn.numpy(), stats.uniform.cdf).pvalue > 1e-3
    assert uniform == (scheme == "uniform")


def test_a_model_that_knows_the_velocity_has_no_loss():
    model = tiny_transformer()
    objective = FlowObjective(model, flow_shift=3.0)
    latents, draws = torch.randn(3, 4, 4, 4), draw(range(3), (4, 4, 4), OPTIONS)
    objective._predict = [lambda *_, **__: draws.noise - latents]
    mask = torch.ones(3, 5, dtype=torch.int64)
    assert objective(latents, draws, torch.randn(3, 5, 8), mask).abs().max() == 0
    objective._predict = [lambda *_, **__: draws.noise - latents + 2.0]
    assert objective(latents, draws, torch.randn(3, 5, 8), mask).tolist() == pytest.approx([4.0] * 3, rel=1e-6)


def test_a_dropped_caption_is_the_null_caption_and_no_other_row_changes():
    model = tiny_transformer()
    objective = FlowObjective(model, flow_shift=3.0)
    latents, embeds, mask = torch.randn(2, 4, 4, 4), torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.int64)
    draws = draw(range(2), (4, 4, 4), NoiseOptions(seed=0))
    kept = objective(latents, draws, embeds, mask)
    dropped = objective(latents, type(draws)(draws.noise, draws.index, torch.tensor([True, False])), embeds, mask)
    null = embeds.clone()
    null[0] = model.y_embedder.y_embedding
    torch.testing.assert_close(dropped, objective(latents, draws, null, mask))
    assert dropped[0] != kept[0] and dropped[1] == kept[1]


def test_trimmed_features_drop_to_the_same_loss():
    """Cached features are cut behind the longest prompt of the batch; padded ones must give the same."""
    objective = FlowObjective(tiny_transformer(), flow_shift=3.0)
    latents, embeds = torch.randn(2, 4, 4, 4), torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    draws = draw(range(2), (4, 4, 4), NoiseOptions(seed=0, drop_probability=1.0))
    assert draws.dropped.all()
    padded = objective(latents, draws, embeds, mask)
    torch.testing.assert_close(objective(latents, draws, embeds[:, :3], mask[:, :3]), padded)
