"""How each network of a pipeline is cut into units that come and go, and which of its tensors stay. Moves nothing."""

from typing import Any

from torch import nn

from sana.models.layers.residency import Slot
from sana.models.layers.schedule import Units

NETWORKS = ("text_encoder", "transformer", "autoencoder")
# Of a block, but read outside its forward; a few kilobytes.
TRANSFORMER_REST = ("scale_shift_table",)
# Part of every checkpoint, but read in training only.
TRANSFORMER_UNREAD = ("pos_embed", "y_embedder.y_embedding")
# Attributes of a language model that hold its layers.
TEXT_LAYERS = ("layers", "block")
# What layerwise casting keeps exact in a unit: parts of names. Vectors (norms, biases) it keeps always, and everything
# outside blocks and layers: embeddings, the projection of the time, the output layer.
CAST_KEPT = ("norm", "embed", "scale_shift_table", "depth_conv", "relative_attention_bias")


def units_of(name: str, network: nn.Module) -> Units:
    """Returns the units of one of NETWORKS."""
    if name == "transformer":
        return _transformer(network)
    return _text_encoder(network) if name == "text_encoder" else _autoencoder(network)


def is_castable(slot: Slot, kept: tuple[str, ...]) -> bool:
    """Whether layerwise casting stores this tensor of a unit in another dtype.

    Args:
        slot: the tensor.
        kept: parts of names that stay exact.
    """
    home = slot.home
    plain = type(home) is nn.Parameter and home.dtype.is_floating_point and home.dtype.itemsize > 1
    return plain and home.dim() >= 2 and not any(part in slot.name for part in kept)


def _transformer(network: Any) -> Units:
    control = list(getattr(network, "controlnet", ()))
    order: list[nn.Module] = []
    for index, block in enumerate(network.blocks):
        if 1 <= index <= len(control):  # as `SanaMSControlNet.run_blocks` goes
            order.append(control[index - 1])
        order.append(block)
    return Units(tuple(order), (network,), rest=TRANSFORMER_REST, unread=TRANSFORMER_UNREAD)


def _text_encoder(network: Any) -> Units:
    model: nn.Module = network.model
    layers = [
        layer
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and path.rpartition(".")[2] in TEXT_LAYERS
        for layer in module
    ]
    inside = {id(module) for layer in layers for module in layer.modules()}
    outside = [module for module in model.modules() if isinstance(module, nn.Embedding) and id(module) not in inside]
    tables = {id(module.weight): module for module in outside}  # T5 reads the last of two modules with one table
    return Units((*tables.values(), *_outermost(layers)), (model,), lazy=True)


def _autoencoder(network: Any) -> Units:
    """Stages of DC-AE, blocks of AutoencoderKL; tiled code calls modules inside them."""
    owner = network if hasattr(network, "decoder") else network.model
    order: list[nn.Module] = []
    for half, backwards in ((owner.encoder, False), (owner.decoder, True)):
        stages = list(getattr(half, "stages", ()))
        if stages:
            order += [half.project_in, *(reversed(stages) if backwards else stages), half.project_out]
        else:
            middle = [half.mid_block] if hasattr(half, "mid_block") else []
            downs, ups = list(getattr(half, "down_blocks", ())), list(getattr(half, "up_blocks", ()))
            order += [*downs, *middle, *ups]
    return Units(tuple(order), (network, owner.encoder, owner.decoder), deep=True)


def _outermost(layers: list[nn.Module]) -> list[nn.Module]:
    """Leaves out lists inside a layer (T5 keeps the parts of a block in one called `layer`)."""
    inside = {id(part) for layer in layers for part in layer.modules() if part is not layer}
    return [layer for layer in layers if id(layer) not in inside]
