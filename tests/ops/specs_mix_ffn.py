"""Variants of the Mix-FFN's kernels for the compile gate, in the block shapes that launches use. No test is here."""

from typing import Any

import torch

from sana.ops.mix_ffn import plan
from tests.ops.kernels import Spec

ALIGNED = "i32:16"  # as launched at the official widths
SIZES = {"height": "i32", "width": "i32"}


def specs() -> list[Spec]:
    """Returns every kernel in every mode, in bfloat16 and once in float32, with all tiles that `plan` gives."""
    return [*expansions(), *activations(), *convolutions(), *gradients(), *smallest()]


def expansions() -> list[Spec]:
    from sana.ops.mix_ffn.forward import expand_kernel

    pointers = ("x", "weight", "bias", "pre", "out")
    signature = dict.fromkeys(pointers, "*bf16:16") | {"rows": "i32", "columns": ALIGNED, "inner": ALIGNED}
    shapes = {
        plan.expansion_plan(tokens, 5760, inner, torch.bfloat16, capability)
        for tokens in (256, 1024)
        for inner in (224, 1152)
        for capability in ((7, 5), (8, 0), (9, 0), (10, 0))
    } - {None}
    return [
        Spec(
            f"mix_ffn.expand glu={glu} keep={keep} even={even} {tuple(gemm)}",
            expand_kernel,
            signature | {"x_stride": ALIGNED},
            {"HAS_BIAS": True, "KEEP": keep, "GLU": glu, "EVEN_K": even, "BLOCK_M": gemm.block_m}
            | {"BLOCK_N": gemm.block_n // 2 if glu else gemm.block_n, "BLOCK_K": gemm.block_k, "GROUP": gemm.group},
            gemm.warps,
            gemm.stages,
        )
        for gemm in sorted(shapes)
        for glu, keep, even in ((False, False, True), (False, True, True), (True, True, True), (False, False, False))
    ]


def activations() -> list[Spec]:
    from sana.ops.mix_ffn.forward import activate_kernel

    signature = {"pre": "*bf16:16", "out": "*bf16:16", "rows": "i32", "columns": ALIGNED}
    blocks = {"BLOCK_M": 8, "BLOCK_N": 128}
    return [
        Spec(f"mix_ffn.activate glu={glu}", activate_kernel, signature, {"GLU": glu} | blocks) for glu in (False, True)
    ]


def blocks(tile: plan.Tile) -> dict[str, object]:
    return {"ROWS": tile.rows, "BLOCK_W": tile.columns, "BLOCK_C": tile.channels}


def convolutions() -> list[Spec]:
    from sana.ops.mix_ffn.forward import depthwise_kernel

    tile = plan.forward_tile(32, (9, 0))
    return [
        Spec(
            f"mix_ffn.depthwise {dtype} gated={gated} hidden {hidden}",
            depthwise_kernel,
            dict.fromkeys(("x", "weight", "bias", "out"), f"*{dtype}:16") | SIZES | {"hidden": hidden},
            {"HAS_BIAS": True, "GATED": gated} | blocks(tile),
            tile.warps,
        )
        for dtype, gated, hidden in (
            ("bf16", True, ALIGNED),
            ("bf16", False, ALIGNED),
            ("fp16", True, "i32"),
            ("fp32", True, ALIGNED),
        )
    ]


def gradients() -> list[Spec]:
    from sana.ops.mix_ffn.backward import gate_backward_kernel, input_backward_kernel

    def build(kernel: Any, dtype: str, tensors: tuple[str, ...], tile: plan.Tile, **modes: bool) -> Spec:
        signature = dict.fromkeys(tensors, f"*{dtype}:16") | {"partial": "*fp32:16"} | SIZES | {"hidden": ALIGNED}
        name = f"mix_ffn.{kernel.__name__} {dtype} {next(reversed(modes))}={next(reversed(modes.values()))}"
        return Spec(name, kernel, signature, modes | blocks(tile), tile.warps)

    gate = ("x", "weight", "bias", "d_out", "out", "d_conv")
    expansion = ("d_conv", "weight", "pre", "d_pre")
    return [
        spec
        for dtype, mode in (("bf16", True), ("bf16", False), ("fp32", True))
        for spec in (
            build(gate_backward_kernel, dtype, gate, plan.weight_gradient_tile(32, (9, 0)), HAS_BIAS=mode, GATED=mode),
            build(input_backward_kernel, dtype, expansion, plan.input_gradient_tile(32, (9, 0)), PRE_GLU=mode),
        )
    ]


def smallest() -> list[Spec]:
    """A launch turns sizes of 1 into constants: a 1 x 1 grid of one channel must compile too."""
    ones: dict[str, object] = dict.fromkeys(("rows", "columns", "inner", "x_stride", "height", "width", "hidden"), 1)
    every = specs_of_one_mode()
    return [
        Spec(
            f"{spec.name} of size 1",
            spec.kernel,
            {name: kind for name, kind in spec.signature.items() if name not in ones},
            spec.constexprs | {name: 1 for name in ones if name in spec.signature},
            spec.num_warps,
            spec.num_stages,
        )
        for spec in every
    ]


def specs_of_one_mode() -> list[Spec]:
    return [expansions()[-1], activations()[-1], convolutions()[0], *gradients()[:2]]
