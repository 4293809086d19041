"""What the compile gate compiles of adaLN: every kernel, every dtype, the widths of 0.6B and 1.6B, and an odd one."""

from tests.ops.kernels import Spec

DTYPES = ("bf16", "fp16", "fp32")
WIDTHS = (33, 1152, 2240)
FLOAT = "*fp32:16"


def modulation_specs(dtype: str, width: int) -> list[Spec]:
    import triton

    from sana.ops.modulation import backward, forward

    block, gate_block = triton.next_power_of_2(width), forward.gate_block(width)
    aligned = ":16" if width % 16 == 0 else ""
    types = dict.fromkeys(("x", "y", "out", "grad", "grad_x", "grad_y"), f"*{dtype}:16")
    types |= dict.fromkeys(("shift", "scale", "gate"), f"*{dtype}{aligned}")  # slices of a table
    types |= {"moments": FLOAT, "parts": FLOAT, "total": FLOAT, "eps": "fp32"}
    types |= {"tokens": "i32", "chunk": "i32", "programs": "i32", "width": f"i32{aligned}"}
    strides = ("x_image", "x_token", "y_image", "y_token", "grad_image", "grad_token")
    types |= dict.fromkeys((*strides, "shift_image", "scale_image", "gate_image"), f"i32{aligned}")
    warps = forward.row_warps(block)
    variants = [
        (forward.layer_norm_kernel, {"BLOCK": block, "SAVE": True}, warps),
        (forward.layer_norm_kernel, {"BLOCK": block, "SAVE": False}, warps),
        (forward.gated_residual_kernel, {"ROWS": forward.GATE_ROWS, "BLOCK": gate_block}, 4),
        (backward.layer_norm_grad_kernel, {"BLOCK": block}, warps),
        (backward.gated_residual_grad_kernel, {"ROWS": backward.GATE_TILE, "BLOCK": gate_block}, 4),
        (backward.sum_parts_kernel, {"BLOCK": 128}, 4),
    ]
    return [
        Spec(
            f"modulation.{kernel.__name__} {dtype} D{width}{' saving' if constexprs.get('SAVE') else ''}",
            kernel,
            {name: types[name] for name in kernel.arg_names if name not in constexprs},
            constexprs,
            num_warps=num_warps,
        )
        for kernel, constexprs, num_warps in variants
        if kernel is not backward.sum_parts_kernel or dtype == "fp32"
    ]


def specs() -> list[Spec]:
    return [spec for dtype in DTYPES for width in WIDTHS for spec in modulation_specs(dtype, width)]
