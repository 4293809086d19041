"""Blocks that are alike, of which a model of memory runs some: what the others hold is known from these.

A block of a transformer, and a layer of a language model, make of their inputs an output of the same shape, and hold
nothing longer but what a cache of keys and values keeps. So in each pass over a network the first block of a kind is
run, and the last one, which has the most beside it; the others make outputs and entries of caches of these shapes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

PLAIN = (str, bool, int, float)
CACHE = "past_key_values"  # what transformers call a layer's keyword for it


class Repeats:
    """Makes the blocks of a network without weights run once a kind and pass.

    Args:
        blocks: in the order of their run.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._kinds = [kind(block) for block in blocks]
        self._known: dict[Any, Any] = {}  # kind and inputs -> shapes of the output, and of what the cache got
        for index, block in enumerate(blocks):
            block.forward = self._instead(index, block.forward)

    def _instead(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        last = self._kinds[index] not in self._kinds[index + 1 :]

        def run(*args: Any, **kwargs: Any) -> Any:
            if index == 0:
                self._known.clear()
            cache = kwargs.get(CACHE)
            before = None if cache is None else length(cache, index)
            key = (self._kinds[index], signature((args, kwargs)), before)
            if key in self._known and not last:
                out, entry = self._known[key]
                if cache is not None and entry is not None:
                    cache.update(*(one.fresh() for one in entry), index)
                return tree_map_only(Shape, Shape.fresh, out)
            result = forward(*args, **kwargs)
            entry = None if cache is None else added(cache, index, before or 0)
            given = {id(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
            if not any(id(one) in given for one in tree_leaves(result) if isinstance(one, Tensor)):
                self._known[key] = (tree_map_only(Tensor, Shape.of, result), entry)
            return result

        return run


@dataclass(frozen=True)
class Shape:
    """What is needed to make a tensor like another one."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> "Shape":
        """Returns that of a tensor."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    def fresh(self) -> Tensor:
        """Returns a new tensor."""
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)


def kind(block: nn.Module) -> Any:
    """Returns what blocks that are alike have in common."""
    found: list[Any] = []
    for path, module in block.named_modules():
        values = {key: value for key, value in vars(module).items() if isinstance(value, PLAIN) and key != "layer_idx"}
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        shapes = tuple((name, one.shape, one.dtype) for name, one in tensors)
        found.append((path, type(module), shapes, tuple(sorted(values.items()))))
    return tuple(found)


def signature(values: Any) -> tuple[Any, ...]:
    """Returns what inputs have to have in common to make outputs of the same shape."""
    leaves = tree_leaves(values)
    return tuple((one.shape, one.dtype, one.stride()) if isinstance(one, Tensor) else plain(one) for one in leaves)


def plain(value: Any) -> Any:
    """Returns a number or a text itself, of other things their kind."""
    return value if value is None or isinstance(value, PLAIN) else type(value)


def length(cache: Any, index: int) -> int:
    """Returns how many tokens a layer's cache holds."""
    return int(cache.get_seq_length(index)) if index < len(cache.layers) else 0


def added(cache: Any, index: int, before: int) -> tuple[Shape, Shape] | None:
    """Returns the shapes of keys and values (B, h, L, d) that a layer has put into a cache."""
    if length(cache, index) == before:
        return None
    keys, values = (_last(one, before) for one in (cache.layers[index].keys, cache.layers[index].values))
    return keys, values


def _last(tensor: Tensor, before: int) -> Shape:
    rows, heads, tokens, size = tensor.shape
    new = tokens - before
    return Shape((rows, heads, new, size), (heads * new * size, new * size, size, 1), tensor.dtype, tensor.device)
