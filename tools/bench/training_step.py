"""One training step, 0.6B at 512 px in bf16 on precomputed features, with diffusers' network in the same loop.

The loop is ours: the flow objective, autocast over float32 weights, clipped gradients, fused AdamW.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sana.models.diffusers_keys import to_diffusers
from sana.training.objective import Draws, FlowObjective, NoiseOptions, draw
from tools.bench.harness import Case, Check, Comparison, Side, Work, compare
from tools.bench.networks import (
    CUT_TOKENS,
    diffusers_transformer,
    fastest,
    forward_flops,
    random_transformer,
    transformer_arguments,
)
from tools.bench.results import OURS
from tools.bench.setting import Setting

PIXELS, FLOW_SHIFT, CLIP = 512, 3.0, 0.1
GRADIENT_TOLERANCE = 1e-2  # of 16 bits
REDUCED = {"hidden_size": 128, "num_heads": 4, "caption_channels": 64}


def cases(setting: Setting) -> list[Case]:
    """The whole network on a GPU; four of its blocks on a CPU."""
    quick, cpu = setting.suite == "quick", setting.device == "cpu"
    batch, blocks = (1, 2) if quick else (2, 4) if cpu else (32, None)
    depth = f", {blocks} of 28 blocks" if blocks else ""
    name = f"training step 0.6B, bf16 autocast, {PIXELS} px, batch {batch}, AdamW{depth}"
    name += ", reduced width" if quick else ""
    key = "" if cpu else "training_step.0.6B"
    build = partial(build_comparison, batch, blocks, setting, REDUCED if quick else {})
    return [Case("training_step", name, build, 10.0, 100.0, 4 if cpu else 10, key)]


@dataclass(frozen=True)
class Features:
    """Cached latents and text of a batch, and the random draws."""

    latents: Tensor
    draws: Draws
    text: Tensor
    mask: Tensor


class DiffusersNetwork(nn.Module):
    """diffusers' network under the interface that our objective calls.

    Args:
        network: a `SanaTransformer2DModel`.
        y_embedder: our caption embedder, for the null caption that diffusers has no place for.
    """

    def __init__(self, network: Any, y_embedder: nn.Module) -> None:
        super().__init__()
        self.network, self.y_embedder = network, y_embedder

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Sana.forward`."""
        return self.network(x, y.squeeze(1), timestep, encoder_attention_mask=mask, return_dict=False)[0]


def build_comparison(batch: int, blocks: int | None, setting: Setting, changed: dict[str, Any]) -> Comparison:
    """Both networks in one kind of loop, on one batch."""
    device = setting.device
    arguments = transformer_arguments("0.6B", PIXELS, blocks) | changed
    ours = random_transformer(arguments, device, torch.float32)
    theirs = diffusers_transformer(ours)
    for network in (ours, theirs):
        network.requires_grad_(True).train()
    features = _features(arguments, batch, device)
    objectives = {
        OURS: FlowObjective(fastest(ours), flow_shift=FLOW_SHIFT),
        "diffusers": FlowObjective(DiffusersNetwork(theirs, ours.y_embedder), flow_shift=FLOW_SHIFT),  # type: ignore[arg-type]
    }

    def check() -> dict[str, Check]:
        exact = _gradients(objectives["diffusers"], features, theirs, wide=True)
        mine = _gradients(objectives[OURS], features, ours)
        other = _gradients(objectives["diffusers"], features, theirs)
        return {"diffusers": compare(mine, other, exact, tolerance=GRADIENT_TOLERANCE)}

    sides = [
        Side(OURS, TrainingStep(objectives[OURS], ours.parameters(), features)),
        Side("diffusers", TrainingStep(objectives["diffusers"], theirs.parameters(), features)),
    ]
    flops = 0.0 if changed else 3 * batch * forward_flops("0.6B", PIXELS, blocks)
    return Comparison(sides, check, device, work=Work(flops=flops, images=batch), facts={"batch": batch})


class TrainingStep:
    """Loss, backward, clipping and optimiser on one batch.

    Args:
        objective: returns one loss an image.
        parameters: that are trained.
        features: the batch.
    """

    def __init__(self, objective: FlowObjective, parameters: Any, features: Features) -> None:
        self._objective, self._features = objective, features
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=1e-6, fused=True)

    def __call__(self) -> Tensor:
        """Runs the step; returns the loss on the device."""
        loss = _loss(self._objective, self._features)
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()


def _loss(objective: FlowObjective, features: Features, wide: bool = False) -> Tensor:
    with torch.autocast(features.latents.device.type, torch.bfloat16, enabled=not wide):
        text = features.text.float() if wide else features.text
        return objective(features.latents, features.draws, text, features.mask).mean()


def _gradients(objective: FlowObjective, features: Features, network: nn.Module, wide: bool = False) -> Tensor:
    """All gradients that both networks have, in one vector in diffusers' order."""
    network.zero_grad()
    _loss(objective, features, wide).backward()
    found: Mapping[str, Tensor] = {
        name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None
    }
    if any(name.startswith("blocks.") for name in found):
        found = to_diffusers(found)[0]
    vector = torch.cat([found[name].flatten() for name in sorted(found)])
    network.zero_grad()
    return vector


def _features(arguments: dict[str, Any], batch: int, device: str) -> Features:
    generator = torch.Generator(device).manual_seed(3)
    randn: Callable[..., Tensor] = partial(torch.randn, generator=generator, device=device)
    side = PIXELS // 32
    shape = (arguments["in_channels"], side, side)
    draws = draw(range(batch), shape, NoiseOptions(seed=0)).to(torch.device(device))
    text = randn(batch, CUT_TOKENS, arguments["caption_channels"]).to(torch.bfloat16)
    lengths = torch.arange(batch, device=device)[:, None] % 16 + CUT_TOKENS - 16
    mask = (torch.arange(CUT_TOKENS, device=device)[None] < lengths).long()
    return Features(randn(batch, *shape), draws, text, mask)
