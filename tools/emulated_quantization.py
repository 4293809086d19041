"""Schemes of quantisation that need CUDA, emulated on a CPU: their rounding, in plain PyTorch, and the bytes they take.

For tools that measure what a scheme does to pictures. Nothing here is fast or small, and no pipeline uses it.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.models.quantization.apply import choose_layers, network_of, open_feed_forward, replace_module
from sana.models.quantization.kernels import int4_values
from sana.models.quantization.schemes import SCHEMES, check_shape, group_size, quantized_bytes
from sana.ops.fp8.function import check_widths
from sana.ops.fp8.reference import Fp8Rows, fp8_linear_reference, quantize_rows

EMULATED = ("int4", "fp8")


class EmulatedLinear(nn.Module):
    """A linear layer that rounds as a scheme of EMULATED does.

    int4: the weight is rounded to 16 levels a group and back; the product is bfloat16, as the kernel's. fp8: weight and
    inputs are rounded to e4m3 with a scale a row; sums are float32.

    Args:
        scheme: its name.
        weight: (N, K) or (N, K, 1, 1), exact.
        bias: (N,), kept as it is.

    Attributes:
        weight_bytes: that the scheme's stored tensors take; what is held here is more.

    Raises:
        ValueError: the scheme is not emulated, or cannot store this shape.
    """

    def __init__(self, scheme: str, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        if scheme not in EMULATED:
            raise ValueError(f"{scheme} is not emulated; {' and '.join(EMULATED)} are.")
        check_shape(weight.shape, SCHEMES[scheme])
        self.scheme = scheme
        self.weight_bytes = quantized_bytes(weight.shape, scheme, weight.dtype)
        self.bias = bias
        matrix = weight.detach().flatten(1)
        if scheme == "int4":
            self.values = int4_weight(matrix)
        else:
            self.rows = quantize_rows(matrix)
            check_widths(*self.rows.values.shape)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), dtype of `x`."""
        if self.scheme == "fp8":
            return fp8_linear_reference(x, Fp8Rows(*self.rows), self.bias)
        out = F.linear(x.to(self.values.dtype), self.values)
        if self.bias is not None:
            out = out + self.bias
        return out.to(x.dtype)


def int4_weight(weight: Tensor) -> Tensor:
    """Returns the bfloat16 numbers (N, K) that the int4 kernel multiplies by in the place of a weight."""
    values, scale_and_zero = int4_values(weight)
    rows, width = weight.shape
    levels = values.view(rows, -1, group_size(width, SCHEMES["int4"])) - 8
    scale, zero = scale_and_zero.transpose(0, 1)[..., None].unbind(2)  # (N, groups, 1)
    return (levels.to(scale.dtype) * scale + zero).view(rows, width)


@torch.no_grad()
def emulate(model: nn.Module, scheme: str, keep: Sequence[str] = ()) -> tuple[str, ...]:
    """Replaces the layers that `quantize` would, and returns their names; the same arguments, the same errors."""
    network, kind = network_of(model)
    chosen = choose_layers(network, kind, scheme, keep)
    open_feed_forward(network, chosen)
    for name in chosen:
        layer = network.get_submodule(name)
        exact = getattr(layer, "conv", layer)
        replace_module(network, name, EmulatedLinear(scheme, exact.weight, exact.bias))
    return chosen


def emulated_bytes(model: nn.Module) -> int:
    """Returns what the weights of an emulated network would take: its exact ones, and what the scheme stores."""
    exact = {id(one): one.nbytes for one in (*model.parameters(), *model.buffers())}
    layers = [one for one in model.modules() if isinstance(one, EmulatedLinear)]
    return sum(exact.values()) + sum(layer.weight_bytes for layer in layers)
