"""What the compile gate compiles of linear attention: every kernel, dtypes, head dims, with and without norms."""

from tests.ops.kernels import Spec

HEAD_DIMS = {"bf16": (24, 32, 64, 128), "fp16": (16,), "fp32": (32, 128)}
SIZES = {"images": "i32", "tokens": "i32", "heads": "i32", "chunk": "i32:16", "chunks": "i32"}
STRIDES = {"stride_image": "i64:16", "stride_token": "i32:16"}
GRAD_STRIDES = {"grad_stride_image": "i64:16", "grad_stride_token": "i32:16"}
FLOAT = "*fp32:16"


def attention_specs(dtype: str, head_dim: int, norm: bool) -> list[Spec]:
    import torch

    from sana.ops.linear_attention import backward, forward

    tiles = forward.choose_tiles(
        head_dim, {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    )
    constexprs = {
        "D": head_dim, "HEAD": tiles.head, "ROWS": tiles.rows, "NORM": norm, "PRECISION": tiles.precision,
    }  # fmt: skip
    types = SIZES | STRIDES | GRAD_STRIDES | {"eps": "fp32", "weight": FLOAT, "scale": FLOAT}
    types |= {"qkv": f"*{dtype}:16", "out": f"*{dtype}:16", "grad": f"*{dtype}:16", "grad_qkv": f"*{dtype}:16"}
    types |= {"sums": FLOAT, "parts": FLOAT, "grad_sums": FLOAT}
    kernels = (
        forward.sums_kernel, forward.output_kernel, backward.query_grad_kernel, backward.key_value_grad_kernel,
    )  # fmt: skip
    return [
        Spec(
            f"linear_attention.{kernel.__name__} {dtype} d{head_dim}{' norm' if norm else ''}",
            kernel,
            {name: types[name] for name in kernel.arg_names if name not in constexprs},
            constexprs | ({"ROWS": tiles.grad_rows} if kernel is backward.query_grad_kernel else {}),
            num_warps=tiles.num_warps,
        )
        for kernel in kernels
    ]


def row_specs(dtype: str) -> list[Spec]:
    from sana.ops.linear_attention import backward, forward

    tensor, sizes = f"*{dtype}:16", SIZES | STRIDES | {"width": "i32:16"}
    rms = {"qkv": tensor, "scale": FLOAT, "eps": "fp32"} | {
        name: sizes[name] for name in ("images", "tokens", "width", "stride_image", "stride_token")
    }
    norm = {"qkv": tensor, "grad_qkv": tensor, "q_weight": FLOAT, "k_weight": FLOAT, "scale": FLOAT, "parts": FLOAT}
    norm |= {"total": "i32", "chunk": "i32"} | {
        name: sizes[name] for name in ("tokens", "width", "stride_image", "stride_token")
    }
    return [
        Spec(f"linear_attention.rms_kernel {dtype}", forward.rms_kernel, rms, {"ROWS": 4, "BLOCK": 1024}),
        Spec(
            f"linear_attention.norm_grad_kernel {dtype}", backward.norm_grad_kernel, norm, {"ROWS": 2, "BLOCK": 4096}, 8
        ),
    ]


def specs() -> list[Spec]:
    from sana.ops.linear_attention import forward

    found = [
        Spec(
            "linear_attention.reduce_kernel",
            forward.reduce_kernel,
            {"parts": FLOAT, "sums": FLOAT, "size": "i32", "chunks": "i32"},
            {"BLOCK": 1024},
        )
    ]
    for dtype, head_dims in HEAD_DIMS.items():
        found += row_specs(dtype)
        for head_dim in head_dims:
            found += attention_specs(dtype, head_dim, norm=False)
    return found + attention_specs("bf16", 32, norm=True)
