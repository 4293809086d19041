"""The transformer in e4m3 with a choice of kernels: `quantize_fp8`. The arithmetic is in `sana.ops.fp8`.

What stays exact: embeddings of patches, times and captions, norms, the attention products, keys and values of the text
(made once a prompt), depthwise convolutions and the output layer.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from sana.models.quantization.linear import QuantizedLinear, QuantizedMixFFN
from sana.models.transformer.mix_ffn import Grid, MixFFN, Mlp
from sana.ops.fp8.function import check_backend, check_widths, fp8_linear, gated_convolution, require_fp8
from sana.ops.fp8.reference import Fp8Rows, quantize_rows

ATTENTION_LAYERS = ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.proj")


class Fp8Linear(QuantizedLinear):
    """A linear layer whose weight is stored in e4m3 with a scale for each output channel; its input is rounded too.

    Args:
        weight: (N, K) or (N, K, 1, 1), the layer's exact weight.
        bias: (N,), kept as it is.
        backend: see `fp8_linear`.

    Raises:
        ValueError: N or K is no multiple of 16.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, backend: str) -> None:
        rows = quantize_rows(weight.detach().flatten(1))
        check_widths(*rows.values.shape)
        super().__init__("fp8", tuple(rows.values.shape), tuple(rows), None if bias is None else bias.clone())
        self.fp8_backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), dtype of `x`."""
        return fp8_linear(x, Fp8Rows(*self.parts), self.bias, backend=self.fp8_backend)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, fp8_backend={self.fp8_backend!r}"


class Fp8MixFFN(QuantizedMixFFN):
    """`MixFFN` whose expansion and projection are `Fp8Linear`; the depthwise convolution stays as it was.

    Args:
        exact: the network to replace; its depthwise convolution is shared.
        backend: see `fp8_linear`; with "triton" the middle is one kernel too, where it is the released 3x3.
    """

    def __init__(self, exact: MixFFN, backend: str) -> None:
        super().__init__(exact)
        self.inverted_conv = Fp8Linear(*exact.inverted_conv.weight_bias, backend)
        self.point_conv = Fp8Linear(*exact.point_conv.weight_bias, backend)
        kernel = tuple(exact.depth_conv.weight_bias[0].shape[-2:])
        released = kernel == (3, 3) and self.dilation == 1 and isinstance(self.glu_act, nn.SiLU)
        self._one_kernel = backend == "triton" and released

    def gate(self, expanded: Tensor, HW: Grid) -> Tensor:
        if self._one_kernel:
            return gated_convolution(expanded, HW, *self.depth_conv.weight_bias)
        return super().gate(expanded, HW)


def quantize_fp8(
    transformer: nn.Module, *, backend: str = "triton", skip_blocks: Collection[int] = ()
) -> tuple[str, ...]:
    """Replaces, in place, the large products of every block by fp8 ones. Load the weights and move the model first.

    These are the self-attention's `qkv` and `proj`, the cross-attention's `q_linear` and `proj`, and both 1x1
    convolutions of the Mix-FFN (or both layers of a plain MLP). Unlike `quantize(transformer, "fp8")` it has a choice
    of kernels, one of which runs anywhere.

    Args:
        transformer: `SanaMS` or a class of its kind, with weights, on the device that it will run on.
        backend: see `fp8_linear`. "reference" runs anywhere and is slow: it shows what fp8 does to pictures.
        skip_blocks: indices of blocks that stay exact.

    Returns:
        Names of the replaced layers, as `blocks.0.attn.qkv`.

    Raises:
        Fp8UnavailableError: the backend is not "reference" and the device cannot.
        ValueError: a width is no multiple of 16, a block does not exist, the feed-forward network is of another kind,
            the weights are on the meta device, or the model is quantised already. Nothing is replaced then.
    """
    check_backend(backend)
    blocks = getattr(transformer, "blocks", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise ValueError(f"{type(transformer).__name__} has no blocks to quantise.")
    if any(not 0 <= index < len(blocks) for index in skip_blocks):
        raise ValueError(f"skip_blocks must be indices from 0 to {len(blocks) - 1}, not {sorted(skip_blocks)}.")
    found = next((module for module in transformer.modules() if isinstance(module, QuantizedLinear)), None)
    if found is not None:
        raise ValueError(f"The transformer is quantised to {found.scheme} already.")
    weight = next(blocks.parameters())
    if weight.is_meta:
        raise ValueError("The transformer has no weights yet; load them first, then quantise.")
    if backend != "reference":
        require_fp8(weight.device)
    chosen = [(f"blocks.{index}", block) for index, block in enumerate(blocks) if index not in skip_blocks]
    with torch.no_grad():
        fresh = [item for name, block in chosen for item in _replacements(name, block, backend)]
    for name, module, _ in fresh:
        parent, _, leaf = name.rpartition(".")
        setattr(transformer.get_submodule(parent), leaf, module)
    return tuple(layer for _, _, layers in fresh for layer in layers)


def _replacements(name: str, block: nn.Module, backend: str) -> list[tuple[str, nn.Module, tuple[str, ...]]]:
    """Returns (name, new module, names of the layers in it) for everything that one block replaces."""
    mlp = block.get_submodule("mlp")
    if not isinstance(mlp, MixFFN | Mlp):
        raise ValueError(f"fp8 knows the ffn_types glumbconv, mlp and dwmlp; {name}.mlp is {type(mlp).__name__}.")
    found: list[tuple[str, nn.Module, tuple[str, ...]]] = []
    try:
        for path in (*ATTENTION_LAYERS, *(("mlp.fc1", "mlp.fc2") if isinstance(mlp, Mlp) else ())):
            layer, full = block.get_submodule(path), f"{name}.{path}"
            found.append((full, Fp8Linear(layer.weight, layer.bias, backend), (full,)))  # type: ignore[arg-type]
        if isinstance(mlp, MixFFN):
            path = "mlp"
            layers = (f"{name}.mlp.inverted_conv", f"{name}.mlp.point_conv")
            found.append((f"{name}.mlp", Fp8MixFFN(mlp, backend), layers))
    except ValueError as error:
        raise ValueError(f"{name}.{path}: {error}") from error
    return found
