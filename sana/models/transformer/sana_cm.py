"""`SanaMSCM`, the continuous-time consistency form of SanaMS (SANA-Sprint), with its presets. Samplers are not here."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from sana.models.transformer.sana import Output, SanaMS

TIMESTEPS = 1000.0


class SanaMSCM(SanaMS):
    """A flow-matching network seen through TrigFlow (SANA-Sprint, section 3.1).

    Latents (divided by sigma_data) and angles t in [0, pi / 2] become flow latents and sigmas, and the predicted
    velocity becomes TrigFlow's F: sigma = sin t / (sin t + cos t), x_flow = x * r and
    F = ((1 - 2 sigma) x_flow + (1 - 2 sigma + 2 sigma^2) v) / r, where r = sqrt(sigma^2 + (1 - sigma)^2).
    """

    cacheable = False

    def _predict(self, x: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Output:
        sine, cosine = torch.sin(timestep), torch.cos(timestep)
        times = sine / (cosine + sine)
        sigma = times.view(-1, 1, 1, 1)
        radius = torch.sqrt(sigma**2 + (1 - sigma) ** 2)
        flow_latents = x * radius
        out = super()._predict(flow_latents, times * TIMESTEPS, *args, **kwargs)
        velocity, *rest = out if isinstance(out, tuple) else (out,)
        trig = ((1 - 2 * sigma) * flow_latents + (1 - 2 * sigma + 2 * sigma**2) * velocity) / radius
        return (trig, *rest) if rest else trig


SanaMSCM_600M_P1_D28 = partial(SanaMSCM, depth=28, hidden_size=1152, num_heads=16, patch_size=1)
SanaMSCM_1600M_P1_D20 = partial(SanaMSCM, depth=20, hidden_size=2240, num_heads=20, patch_size=1)
SanaMSCM_2400M_P1_D30 = partial(SanaMSCM, depth=30, hidden_size=2240, num_heads=20, patch_size=1)
SanaMSCM_Tiny_P1 = partial(SanaMSCM, depth=6, hidden_size=224, num_heads=7, patch_size=1)
