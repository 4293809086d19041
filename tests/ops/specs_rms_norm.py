"""What the compile gate compiles of the RMS norm of image channels: both kernels, layouts, dtypes, widths of DC-AE."""

from tests.ops.kernels import Spec

DTYPES = ("bf16", "fp16", "fp32")
CHANNELS = (33, 128, 1024, 8192)
FLOAT = "*fp32:16"


def rms_norm_specs(dtype: str, channels: int, channels_last: bool) -> list[Spec]:
    from sana.ops.rms_norm import backward, forward

    aligned = ":16" if channels % 16 == 0 else ""
    types = dict.fromkeys(("x", "weight", "bias", "out", "grad", "grad_x"), f"*{dtype}:16")
    types |= {"scale": FLOAT, "parts": FLOAT, "eps": "fp32", "pixels": "i32:16", "channels": f"i32{aligned}"}
    for name in ("x", "out", "grad"):
        types |= {f"{name}_image": "i64:16", f"{name}_channel": "i32:16", f"{name}_pixel": f"i32{aligned}"}
    specs = []
    for kernel, act in ((forward.rms_norm_kernel, 2), (backward.rms_norm_grad_kernel, 1)):
        grad = kernel is backward.rms_norm_grad_kernel
        tile = forward.choose_tile(channels, channels_last, backward=grad)
        constexprs = {"PIXELS": tile.pixels, "STEP": tile.channels, "ACT": act, "HAS_WEIGHT": True, "HAS_BIAS": True}
        constexprs |= {} if grad else {"WHOLE": tile.whole, "SAVE": True}
        one = "channel" if channels_last else "pixel"  # a launch makes strides of 1 part of the kernel
        constexprs |= {name: 1 for name in kernel.arg_names if name.endswith(f"_{one}")}
        signature = {name: types[name] for name in kernel.arg_names if name not in constexprs}
        layout = "channels last" if channels_last else "contiguous"
        specs.append(Spec(f"rms_norm.{kernel.__name__} {dtype} C{channels} {layout}", kernel, signature, constexprs))
    return specs


def specs() -> list[Spec]:
    return [
        spec
        for dtype in DTYPES
        for channels in CHANNELS
        for channels_last in (True, False)
        for spec in rms_norm_specs(dtype, channels, channels_last)
    ]
