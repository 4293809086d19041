"""What an optimiser keeps of every parameter, and what its step holds besides: formulas of shapes. None is built here.

The algorithms are in `sana.training`; `tests/pipelines/memory/test_optimizers.py` compares each line with a real step.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sana.config import ConfigError
from sana.registry import suggest

Shape = tuple[int, ...]
Shapes = list[tuple[str, Shape]]  # name and shape of every parameter
FP32 = 4  # bytes
BLOCK_8BIT, LEAST_8BIT = 256, 4096  # bitsandbytes: numbers that share a scale; tensors of fewer stay in float32
MAPS_8BIT = 2 * 256 * FP32  # its tables of levels, of which all parameters share one each
MUON_REST = ("embed_tokens", "final_layer", "x_embedder", "t_block", "t_embedder")  # `sana.training.muon.EXCLUDED`
# How many float32 copies of the largest parameter an update makes: squares, averages, updates and what divides them.
COPIES = {"AdamW8bit": 5, "Adafactor": 4, "CAME": 5, "Muon": 3, "Prodigy": 1}


def state_bytes(options: Mapping[str, Any], parameters: Iterable[tuple[str, Shape]]) -> int:
    """Returns the bytes of the state of `train.optimizer` after its first step; parameters are float32.

    Args:
        options: `train.optimizer`.
        parameters: name and shape of every trainable parameter.

    Raises:
        ConfigError: its type is unknown.
    """
    state, _ = _formulas(options)
    return state(list(parameters), options)


def step_bytes(options: Mapping[str, Any], parameters: Iterable[tuple[str, Shape]]) -> int:
    """Returns the bytes that a step holds besides parameters, gradients and state.

    Raises:
        ConfigError: the type is unknown.
    """
    _, step = _formulas(options)
    return step(list(parameters))


def _formulas(options: Mapping[str, Any]) -> tuple[Callable[[Shapes, Mapping[str, Any]], int], Callable[[Shapes], int]]:
    name = str(options.get("type", "AdamW"))
    if name not in OPTIMIZERS:
        raise ConfigError(
            f"The memory of train.optimizer.type {name!r} is not predicted.{suggest(name, list(OPTIMIZERS))} Known: "
            f"{', '.join(OPTIMIZERS)}."
        )
    return OPTIMIZERS[name]


def _each(formula: Callable[[Shape], int]) -> Callable[[Shapes, Mapping[str, Any]], int]:
    return lambda parameters, options: sum(formula(shape) for _, shape in parameters)


def _adamw(shape: Shape) -> int:
    return 2 * math.prod(shape) * FP32 + FP32  # both moments, and the number of the step


def _adamw_8bit(parameters: Shapes, options: Mapping[str, Any]) -> int:
    total = 0
    for _, shape in parameters:
        count = math.prod(shape)
        small = count < int(options.get("min_8bit_size", LEAST_8BIT))
        total += 2 * count * FP32 if small else 2 * (count + -(-count // BLOCK_8BIT) * FP32)
    return total + MAPS_8BIT


def _adafactor(shape: Shape) -> int:
    if len(shape) < 2:
        return math.prod(shape) * FP32 + FP32
    return (math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1]) * FP32 + FP32


def _came(shape: Shape) -> int:
    """`came_pytorch`: factored along the last two axes, which leaves 1x1 convolutions as large as they are."""
    if len(shape) < 2:
        return 2 * math.prod(shape) * FP32
    return (math.prod(shape) + 2 * (math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1])) * FP32


def is_matrix(shape: Shape) -> bool:
    """Whether Sana's CAME factors a parameter: a linear layer or a 1x1 convolution."""
    return len(shape) == 2 or (len(shape) == 4 and shape[2:] == (1, 1))


def _came_wrapper(shape: Shape) -> int:
    factored = 2 * (shape[0] + shape[1]) if is_matrix(shape) else math.prod(shape)
    return (math.prod(shape) + factored) * FP32


def _came_8bit(parameters: Shapes, options: Mapping[str, Any]) -> int:
    least, rows = int(options.get("min_8bit_size", 16384)), int(options.get("block_size", 2048))
    total = 0
    for _, shape in parameters:
        count = math.prod(shape)
        if is_matrix(shape) and count > least:
            total += count + (2 * -(-shape[0] // rows) + 2 * (shape[0] + shape[1])) * FP32
        else:
            total += _came_wrapper(shape)
    return total


def _lion(shape: Shape) -> int:
    return math.prod(shape) * FP32


def _muon(parameters: Shapes, options: Mapping[str, Any]) -> int:
    excluded = tuple(options.get("exclude", MUON_REST))
    return sum(_lion(shape) if _is_orthogonal(name, shape, excluded) else _adamw(shape) for name, shape in parameters)


def _is_orthogonal(name: str, shape: Shape, excluded: tuple[str, ...]) -> bool:
    """`sana.training.muon.split_named_parameters`."""
    large = len(shape) in (2, 4) and math.prod(shape[1:]) > 25 and shape[0] > 4
    return large and not any(word in name for word in excluded)


def _prodigy(parameters: Shapes, options: Mapping[str, Any]) -> int:
    every = int(options.get("slice_p", 1))
    return sum((2 * math.prod(shape) + 2 * -(-math.prod(shape) // every)) * FP32 for _, shape in parameters)


def _nothing(parameters: Shapes) -> int:
    return 0


def _largest(copies: int) -> Callable[[Shapes], int]:
    return lambda parameters: copies * FP32 * max((math.prod(shape) for _, shape in parameters), default=0)


def _all(parameters: Shapes) -> int:
    return sum(math.prod(shape) for _, shape in parameters) * FP32


# Name -> (state of all parameters, what a step holds besides). The names are those of `sana.training.optimizer`.
OPTIMIZERS: dict[str, tuple[Callable[[Shapes, Mapping[str, Any]], int], Callable[[Shapes], int]]] = {
    "AdamW": (_each(_adamw), _nothing),  # one fused kernel
    "AdamW8bit": (_adamw_8bit, _largest(COPIES["AdamW8bit"])),
    "AdamW8bitWrapper": (_adamw_8bit, _largest(COPIES["AdamW8bit"])),
    "Adafactor": (_each(_adafactor), _largest(COPIES["Adafactor"])),
    "CAME": (_each(_came), _largest(COPIES["CAME"])),
    "CAMEWrapper": (_each(_came_wrapper), _largest(COPIES["CAME"])),
    "CAME8BitWrapper": (_came_8bit, _largest(COPIES["CAME"])),
    "Lion": (_each(_lion), _all),  # the updates of all parameters together
    "Muon": (_muon, _largest(COPIES["Muon"])),
    "Prodigy": (_prodigy, _largest(COPIES["Prodigy"])),
}
