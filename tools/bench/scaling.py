"""Tokens against time at the width of 0.6B: attention alone, and the whole transformer at 512 to 4096 px.

Linear and softmax attention are different functions: each is compared with its own plain form, never with the other.
On a CPU, freed memory is kept for the next tensors, as the pipeline has it (`sana.utils.allocator`): without that, the
kernel clears fresh pages for every activation of some MiB, which large images have and small ones have not.
"""

import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sana import ops
from sana.models.transformer.attention import set_backend
from sana.ops.linear_attention.reference import linear_attention_reference
from sana.utils.allocator import keep_freed_memory
from tools.bench.block_stack import REDUCED
from tools.bench.harness import Case, Check, Comparison, Side, Work, compare
from tools.bench.networks import (
    DTYPES,
    STEPS,
    CachedDenoiser,
    Inputs,
    exact_convolutions,
    fastest,
    random_inputs,
    random_transformer,
    transformer_arguments,
    usable_triton,
)
from tools.bench.setting import Setting

DIM, LINEAR_HEAD, SOFTMAX_HEAD = 1152, 32, 72
LINEAR, SOFTMAX = "linear attention", "softmax attention"
SIDES = {"quick": (8, 16), "cpu": (16, 32, 64, 96), "gpu": (16, 32, 64, 128, 192, 256)}
PIXELS = {"quick": (256, 128), "cpu": (4096, 1024, 2048, 512), "gpu": (4096, 1024, 2048, 512)}  # the largest first
BLOCKS = {"quick": 1, "cpu": 1, "gpu": 4}
PATCH = 32  # pixels of an image that one token stands for, to either side


def cases(setting: Setting) -> list[Case]:
    """Attention alone, one case a number of tokens; then the transformer, all sizes of an image in one case."""
    dtypes = ("fp32", "bf16") if setting.device == "cpu" else ("bf16",)
    found = []
    for side in SIDES[setting.suite]:
        name = f"attention on {side * side} tokens ({PATCH * side} px), {dtypes[0]}, width {DIM}, batch 1"
        build = partial(build_comparison, side, dtypes[0], setting)
        found.append(Case("scaling", name, build, 2.0, 40.0, 3, "scaling"))
    found += [_transformer_case(LINEAR, dtype, setting) for dtype in dtypes]
    return [*found, _transformer_case(SOFTMAX, dtypes[0], setting)]


def _transformer_case(kind: str, dtype: str, setting: Setting) -> Case:
    blocks, largest = BLOCKS[setting.suite], (max(PIXELS[setting.suite]) // PATCH) ** 2
    width = "reduced width" if setting.suite == "quick" else "0.6B widths"
    name = (
        f"time of {largest} latent tokens, DiT of {blocks} block{'s'[: blocks > 1]}, {width}, {kind}, {dtype}, batch 1"
    )
    key = f"scaling.{kind.split(' ')[0]}.{dtype}"
    build = partial(build_transformer_comparison, kind, dtype, setting)
    return Case("scaling", name, build, 5.0, 150.0, 4 if kind == LINEAR else 2, key)


def build_transformer_comparison(kind: str, dtype: str, setting: Setting) -> Comparison:
    """One network at all sizes: each side makes as many tokens as the largest image has, so times are times a token.

    Sizes run in turn, so that a machine that gets slower does so for all of them.
    """
    if setting.device == "cpu":
        keep_freed_memory()
    quick, blocks = setting.suite == "quick", BLOCKS[setting.suite]
    arguments = transformer_arguments("0.6B", 1024, blocks) | (REDUCED if quick else {})
    if kind == SOFTMAX:
        arguments |= {"attn_type": "flash"}
    model = fastest(random_transformer(arguments, setting.device, DTYPES[dtype]))
    sizes = PIXELS[setting.suite]
    steps = {
        pixels: CachedDenoiser(model, random_inputs(arguments, 1, pixels, setting.device, DTYPES[dtype]))
        for pixels in sizes
    }

    def check() -> dict[str, Check]:
        found = {}
        for pixels in sorted(sizes)[1:3]:  # the largest image would take the plain form too long
            inputs = steps[pixels].inputs
            exact = None if dtype == "fp32" else _plain(model, inputs, torch.float32)
            plain = _plain(model, inputs, DTYPES[dtype])
            found[f"plain form, {pixels} px"] = compare(steps[pixels](), plain, exact)
        return found

    sides = [Side(f"{pixels} px", partial(_repeat, steps[pixels], (max(sizes) // pixels) ** 2)) for pixels in sizes]
    facts = {"dtype": dtype, "blocks": blocks, "attention": kind, "pixels": list(sizes)}
    # Softmax attention on the largest image takes ten seconds: what is cold at first does not show in them.
    return Comparison(sides, check, setting.device, facts=facts, warm_up=kind == LINEAR)


def _repeat(step: CachedDenoiser, times: int) -> Tensor:
    for _ in range(times):
        out = step()
    return out


@torch.inference_mode()
def _plain(model: Any, inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """The middle step by no fast form of any operator."""
    plain = copy.deepcopy(model).to(dtype)
    set_backend(plain, "reference")
    with exact_convolutions():
        text = inputs.text.to(dtype)
        return plain(inputs.latents.to(dtype), inputs.timesteps[STEPS // 2], text, inputs.mask)


def build_comparison(side: int, dtype: str, setting: Setting) -> Comparison:
    """Both kinds of attention, without the projections around them."""
    tokens, device = side * side, setting.device
    if device == "cpu":
        keep_freed_memory()
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(1, tokens, 3 * DIM, generator=generator, device=device).to(DTYPES[dtype])
    backend = "triton" if usable_triton(device) else "auto"
    heads = DIM // LINEAR_HEAD

    @torch.no_grad()
    def linear() -> Tensor:
        return ops.linear_attention(qkv, heads, backend=backend)

    @torch.no_grad()
    def softmax() -> Tensor:
        parts = (part.unflatten(-1, (-1, SOFTMAX_HEAD)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        return F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)

    def check() -> dict[str, Check]:
        ours = linear()
        return {"float32 reference": compare(ours, linear_attention_reference(qkv.float(), heads).to(ours.dtype))}

    sides = [Side(LINEAR, linear), Side(SOFTMAX, softmax)]
    facts = {"tokens": tokens, "dtype": dtype}
    return Comparison(sides, check, device, kernels=True, work=Work(bytes=qkv.nbytes * 4 / 3), facts=facts)
