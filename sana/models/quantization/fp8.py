"""Replacing the large products of a loaded transformer by fp8 ones. The arithmetic is in `sana.ops.fp8`.

What stays exact: embeddings of patches, times and captions, norms, the attention products, keys and values of the text
(made once a prompt), depthwise convolutions and the output layer.
"""

from collections.abc import Callable, Collection
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from sana.models.checkpoint import CheckpointError
from sana.models.transformer.mix_ffn import MixFFN, Mlp
from sana.ops.fp8.function import check_backend, check_widths, fp8_linear, gated_convolution, require_fp8
from sana.ops.fp8.reference import Fp8Rows, quantize_rows
from sana.ops.mix_ffn.reference import depthwise_conv, to_image, to_tokens

ATTENTION_LAYERS = ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.proj")
REFUSAL = (
    "The transformer is quantised to fp8, which cannot be undone: its weights are neither saved nor loaded. "
    "Load the checkpoint into a fresh model, and quantise after that."
)


class Fp8Linear(nn.Module):
    """A linear layer whose weight is stored in e4m3 with a scale for each output channel; its input is rounded too.

    It is moved by `.to(device)`, but keeps its precision whatever dtype the model is moved to. It has no state dict.

    Args:
        weight: (N, K), the layer's exact weight.
        bias: (N,), kept as it is.
        backend: see `fp8_linear`.

    Raises:
        ValueError: N or K is no multiple of 16.
    """

    values: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, backend: str) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        check_widths(self.in_features, self.out_features)
        self.fp8_backend = backend
        rows = quantize_rows(weight.detach())
        self.register_buffer("values", rows.values)
        self.register_buffer("scale", rows.scale)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), dtype of `x`."""
        return fp8_linear(x, Fp8Rows(self.values, self.scale), self.bias, backend=self.fp8_backend)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, fp8_backend={self.fp8_backend!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Fp8Linear":
        """Moves the buffers as PyTorch asks; e4m3 numbers and their scales change the device only."""
        device = fn(torch.empty(0, device=self.scale.device)).device
        values, scale = self.values.to(device), self.scale.to(device)
        super()._apply(fn, recurse)
        self.values, self.scale = values, scale
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise CheckpointError(REFUSAL)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise CheckpointError(REFUSAL)


class Fp8MixFFN(nn.Module):
    """`MixFFN` whose expansion and projection are `Fp8Linear`; the depthwise convolution stays as it was.

    Args:
        exact: the network to replace; its depthwise convolution is shared.
        backend: see `fp8_linear`.
    """

    def __init__(self, exact: MixFFN, backend: str) -> None:
        super().__init__()
        self.act, self.glu_act, self.out_act = exact.act, exact.glu_act, exact.out_act
        self.dilation = exact.dilation
        self.inverted_conv = _pointwise(exact.inverted_conv, backend)
        self.depth_conv = exact.depth_conv
        self.point_conv = _pointwise(exact.point_conv, backend)
        kernel = exact.depth_conv.weight_bias[0].shape[-2:]
        self._kernel_fits = tuple(kernel) == (3, 3) and self.dilation == 1 and isinstance(self.glu_act, nn.SiLU)

    def forward(self, x: Tensor, HW: tuple[int, int]) -> Tensor:
        """(B, N, D) -> (B, N, D); HW is the grid of the N tokens."""
        weight, bias = self.depth_conv.weight_bias
        expanded = self.act(self.inverted_conv(x))
        if self.inverted_conv.fp8_backend == "triton" and self._kernel_fits:
            gated = gated_convolution(expanded, HW, weight, bias)
        else:
            value, gate = depthwise_conv(to_image(expanded, HW), weight, bias, self.dilation).chunk(2, dim=1)
            gated = to_tokens(value * self.glu_act(gate))
        return self.out_act(self.point_conv(gated))


def quantize_fp8(
    transformer: nn.Module, *, backend: str = "triton", skip_blocks: Collection[int] = ()
) -> tuple[str, ...]:
    """Replaces, in place, the large products of every block by fp8 ones. Load the weights and move the model first.

    These are the self-attention's `qkv` and `proj`, the cross-attention's `q_linear` and `proj`, and both 1x1
    convolutions of the Mix-FFN (or both layers of a plain MLP).

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
    if any(isinstance(module, Fp8Linear) for module in transformer.modules()):
        raise ValueError("The transformer is quantised to fp8 already.")
    weight = next(blocks.parameters())
    if weight.is_meta:
        raise ValueError("The transformer has no weights yet; load them first, then quantise.")
    if backend != "reference":
        require_fp8(weight.device)
    chosen = [(f"blocks.{index}", block) for index, block in enumerate(blocks) if index not in skip_blocks]
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
    for path in (*ATTENTION_LAYERS, *(("mlp.fc1", "mlp.fc2") if isinstance(mlp, Mlp) else ())):
        layer: Any = block.get_submodule(path)
        full = f"{name}.{path}"
        found.append((full, _build(full, Fp8Linear, layer.weight, layer.bias, backend), (full,)))
    if isinstance(mlp, MixFFN):
        layers = (f"{name}.mlp.inverted_conv", f"{name}.mlp.point_conv")
        found.append((f"{name}.mlp", _build(f"{name}.mlp", Fp8MixFFN, mlp, backend), layers))
    return found


def _build(name: str, make: Callable[..., nn.Module], *args: Any) -> nn.Module:
    try:
        return make(*args)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _pointwise(layer: Any, backend: str) -> Fp8Linear:
    """Returns a 1x1 convolution as a linear layer over tokens."""
    weight, bias = layer.weight_bias
    return Fp8Linear(weight.flatten(1), bias, backend)
