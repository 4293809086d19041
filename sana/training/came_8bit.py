"""CAME whose largest state, the average of the updates of large matrices, takes one byte a value instead of four."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sana.training.came import CAMEWrapper, is_matrix

LEVELS = 255


class CAME8BitWrapper(CAMEWrapper):
    """CAME with `exp_avg` quantised linearly between the least and the greatest value of a block of rows.

    Matrices of more than `min_8bit_size` values have `exp_avg` as uint8, and `exp_avg_scale` and `exp_avg_min` with one
    number a block; everything else is as in `CAMEWrapper`. The official code splits by rows too, so that its default
    of 2048 means 2048 rows, not values; its blocks of equal values divide 0 by 0, ours give that value back.

    Args:
        params: parameters or groups.
        lr: learning rate.
        eps, clip_threshold, betas, weight_decay: see `CAMEWrapper`.
        block_size: rows that share one range.
        min_8bit_size: matrices of this many values or fewer stay in float32.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        weight_decay: float = 0.0,
        block_size: int = 2048,
        min_8bit_size: int = 16384,
    ) -> None:
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}; it must be at least 1 row.")
        blocks = {"block_size": block_size, "min_8bit_size": min_8bit_size}
        super().__init__(params, lr, eps, clip_threshold, betas, weight_decay, **blocks)

    def _create(self, state: dict[str, Any], gradient: Tensor, parameter: Tensor, group: dict[str, Any]) -> None:
        super()._create(state, gradient, parameter, group)
        if is_matrix(parameter.shape) and parameter.numel() > group["min_8bit_size"]:
            blocks = -(-len(parameter) // group["block_size"])
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.uint8)
            state["exp_avg_scale"], state["exp_avg_min"] = gradient.new_zeros(2, blocks).unbind()

    def _average(self, state: dict[str, Any], update: Tensor, group: dict[str, Any]) -> Tensor:
        if state["exp_avg"].dtype != torch.uint8:
            return super()._average(state, update, group)
        stored = state["exp_avg"].view(update.shape)
        average = dequantise(stored, state["exp_avg_scale"], state["exp_avg_min"], group["block_size"])
        average.mul_(group["betas"][0]).add_(update, alpha=1 - group["betas"][0])
        quantise_into(stored, state["exp_avg_scale"], state["exp_avg_min"], average, group["block_size"])
        return average


def quantise_into(stored: Tensor, scale: Tensor, low: Tensor, values: Tensor, block_size: int) -> None:
    """Writes values (R, C) as stored * scale + low, where each block of `block_size` rows has its own scale and low."""
    for block, (target, source) in enumerate(zip(stored.split(block_size), values.split(block_size), strict=True)):
        least, greatest = torch.aminmax(source)
        step = (greatest - least) / LEVELS
        scale[block], low[block] = step, least
        step = torch.where(step == 0, torch.ones_like(step), step)  # equal values: level 0 gives them back
        target.copy_(((source - least) / step).round_().clamp_(0, LEVELS))


def dequantise(stored: Tensor, scale: Tensor, low: Tensor, block_size: int) -> Tensor:
    """Returns the (R, C) values that `quantise_into` stored, in the dtype of `scale`."""
    values = stored.to(scale.dtype)
    for block, part in enumerate(values.split(block_size)):
        part.mul_(scale[block]).add_(low[block])
    return values
