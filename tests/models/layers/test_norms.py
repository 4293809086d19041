"""The RMSNorm module: its initial weight, its key, its dtype."""

import torch

from sana.models.layers.norms import RMSNorm


def test_weight_starts_at_the_scale_factor_and_scales_the_output() -> None:
    norm = RMSNorm(8, scale_factor=0.01)
    assert list(norm.state_dict()) == ["weight"]
    x = torch.randn(4, 8)
    torch.testing.assert_close(norm(x).square().mean(-1).sqrt(), torch.full((4,), 0.01), rtol=1e-3, atol=0)


def test_keeps_the_dtype() -> None:
    assert RMSNorm(8).to(torch.bfloat16)(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
