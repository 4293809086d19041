"""The TrigFlow view of a flow-matching network."""

import math

import torch

from sana.models.transformer.sana_cm import SanaMSCM
from tests.models.transformer.networks import inputs, small
from tests.tolerance import rms_ratio

CONSISTENCY = {"timestep_norm_scale_factor": 1000.0, "cross_attn_type": "vanilla", "qk_norm": True, "cross_norm": True}


def test_the_exact_velocity_of_a_point_becomes_the_exact_trigflow_direction() -> None:
    """For x_t = cos(t) x0 + sin(t) z TrigFlow's F is dx/dt = cos(t) z - sin(t) x0, and the flow velocity is z - x0."""
    model, batch = small(SanaMSCM, **CONSISTENCY), inputs()
    latents, noise = batch["x"], torch.randn_like(batch["x"])
    model.final_layer.register_forward_hook(
        lambda module, args, out: (noise - latents)[model_row.pop(0)].flatten(1).T[None]
    )
    for angle in (0.1, math.pi / 4, 1.5):
        t = torch.full((2,), angle)
        model_row = [0, 1]
        out = model(math.cos(angle) * latents + math.sin(angle) * noise, t, batch["y"], batch["mask"])
        torch.testing.assert_close(out, math.cos(angle) * noise - math.sin(angle) * latents, rtol=1e-4, atol=1e-5)


def test_forward_mode_derivative_equals_a_finite_difference() -> None:
    """sCM training differentiates the network along its trajectory."""
    model = small(SanaMSCM, **CONSISTENCY).double()
    model.y_embedder.y_embedding = model.y_embedder.y_embedding.double()
    batch = inputs()
    x, t, text = batch["x"].double(), torch.tensor([0.4, 1.1], dtype=torch.float64), batch["y"].double()
    dx, dt = torch.randn_like(x), torch.rand_like(t)

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return model(x, t, text, batch["mask"], jvp=True)

    _, tangent = torch.func.jvp(network, (x, t), (dx, dt))
    step = 1e-3
    difference = (network(x + step * dx, t + step * dt) - network(x - step * dx, t - step * dt)) / (2 * step)
    assert rms_ratio(tangent, difference) < 1e-2  # ReLU kinks and the float32 time embedding
