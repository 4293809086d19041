"""Four blocks at the widths of the 0.6B model against diffusers' blocks with the same weights, on a CPU or a GPU.

300 text tokens of which 60 are real. diffusers' caption projection and norm are taken out of its forward, so that
blocks are compared with blocks; ours count, once in 20 steps, inside the preparation of the text cache.
"""

from functools import partial
from typing import Any

import torch
from torch import nn

from tools.bench.harness import Case, Check, Comparison, Side, Work, compare
from tools.bench.networks import (
    DTYPES,
    STEPS,
    CachedDenoiser,
    Inputs,
    diffusers_step,
    diffusers_transformer,
    exact_step,
    fastest,
    forward_flops,
    random_inputs,
    random_transformer,
    transformer_arguments,
)
from tools.bench.results import OURS
from tools.bench.setting import Setting

BLOCKS = 4
REDUCED = {"hidden_size": 128, "num_heads": 4, "caption_channels": 64}


def cases(setting: Setting) -> list[Case]:
    """Both dtypes, both sizes."""
    found = []
    for dtype in ("fp32", "bf16"):
        for pixels in (256,) if setting.suite == "quick" else (512, 1024):
            note = ", reduced width" if setting.suite == "quick" else " at 0.6B widths"
            name = f"{BLOCKS} DiT blocks{note}, {dtype}, {pixels} px, batch 1"
            build = partial(build_comparison, dtype, pixels, setting)
            found.append(Case("block_stack", name, build, 3.0, 120.0, key=f"block_stack.{dtype}.{pixels}"))
    return found


def build_comparison(dtype: str, pixels: int, setting: Setting) -> Comparison:
    """Our blocks, with cached text and times, and diffusers' blocks."""
    quick = setting.suite == "quick"
    arguments = transformer_arguments("0.6B", 512 if quick else pixels, BLOCKS) | (REDUCED if quick else {})
    model = random_transformer(arguments, setting.device, DTYPES[dtype])
    theirs = diffusers_transformer(model)
    inputs = random_inputs(arguments, 1, pixels, setting.device, DTYPES[dtype])
    blocks_only = _without_captions(theirs, inputs)
    exact = None if dtype == "fp32" else exact_step(model, inputs)
    step, their_step = CachedDenoiser(fastest(model), inputs), diffusers_step(theirs, blocks_only)

    def check() -> dict[str, Check]:
        return {"diffusers": compare(step(), their_step(), exact)}

    sides = [Side(OURS, step, step.prepare, STEPS), Side("diffusers", their_step)]
    flops = 0.0 if quick else forward_flops("0.6B", pixels, BLOCKS)
    return Comparison(sides, check, setting.device, work=Work(flops=flops), facts={"dtype": dtype, "blocks": BLOCKS})


@torch.inference_mode()
def _without_captions(theirs: Any, inputs: Inputs) -> Inputs:
    """Takes the caption projection and norm out of diffusers' network; returns inputs with their result."""
    text = theirs.caption_norm(theirs.caption_projection(inputs.text))
    theirs.caption_projection, theirs.caption_norm = nn.Identity(), nn.Identity()
    return Inputs(inputs.latents, inputs.timesteps, text, inputs.mask)
