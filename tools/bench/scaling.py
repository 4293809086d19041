"""Tokens against time: ReLU linear attention and softmax attention on the same projections, at the width of 0.6B.

They are different functions: linear attention is compared with its float32 form, softmax attention with nothing.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sana import ops
from sana.ops.linear_attention.reference import linear_attention_reference
from tools.bench.harness import Case, Check, Comparison, Side, Work, compare
from tools.bench.networks import DTYPES, usable_triton
from tools.bench.setting import Setting

DIM, LINEAR_HEAD, SOFTMAX_HEAD = 1152, 32, 72
LINEAR, SOFTMAX = "linear attention", "softmax attention"
SIDES = {"quick": (8, 16), "cpu": (16, 32, 64, 96), "gpu": (16, 32, 64, 128, 192, 256)}


def cases(setting: Setting) -> list[Case]:
    """One case a number of tokens, as images of 32 pixels a token."""
    dtype = "fp32" if setting.device == "cpu" else "bf16"
    found = []
    for side in SIDES[setting.suite]:
        name = f"attention on {side * side} tokens ({32 * side} px), {dtype}, width {DIM}, batch 1"
        build = partial(build_comparison, side, dtype, setting)
        found.append(Case("scaling", name, build, 2.0, 40.0, 3, "scaling"))
    return found


def build_comparison(side: int, dtype: str, setting: Setting) -> Comparison:
    """Both kinds of attention, without the projections around them."""
    tokens, device = side * side, setting.device
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
