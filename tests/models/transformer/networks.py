"""Small networks with random, non-zero weights, and inputs for them. No test is here."""

from typing import Any

import torch
from torch import Tensor

from sana.models.transformer.controlnet import SanaMSControlNet
from sana.models.transformer.sana import Sana, SanaMS
from sana.models.transformer.sana_cm import SanaMSCM

SMALL = {
    "input_size": 8,
    "patch_size": 1,
    "in_channels": 4,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "caption_channels": 12,
    "model_max_length": 10,
    "pred_sigma": False,
    "learn_sigma": False,
    "y_norm": True,
    "y_norm_scale_factor": 0.5,
    "attn_type": "linear",
    "ffn_type": "glumbconv",
    "use_pe": False,
    "linear_head_dim": 16,
    "copy_blocks_num": 1,
}
KINDS = {kind.__name__: kind for kind in (Sana, SanaMS, SanaMSCM, SanaMSControlNet)}


def small(kind: type[Sana] = SanaMS, **changes: Any) -> Sana:
    """Returns a small network in evaluation mode with every parameter and the null caption drawn at random."""
    model = kind(**{**SMALL, **changes})
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        model.y_embedder.y_embedding.copy_(torch.randn(model.y_embedder.y_embedding.shape, generator=generator))
    return model.eval()


def inputs(rows: int = 2, size: tuple[int, int] = (4, 6), lengths: list[int] | None = None) -> dict[str, Tensor]:
    """Returns latents, times, captions and a mask of the given caption lengths."""
    lengths = lengths or [3, 10, 7, 1, 5, 9][:rows]
    generator = torch.Generator().manual_seed(3)
    return {
        "x": torch.randn(rows, 4, *size, generator=generator),
        "timestep": torch.rand(rows, generator=generator) * 1000,
        "y": torch.randn(rows, 1, 10, 12, generator=generator),
        "mask": (torch.arange(10) < torch.tensor(lengths)[:, None]).long(),
    }
