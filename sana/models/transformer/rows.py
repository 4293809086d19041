"""Computing a batch row by row, so that a row's bits never depend on its neighbours. The network itself is not here."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def call_by_row(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: dict[str, Any],
    rows: int,
    pag_rows: int,
    options: dict[str, Any],
) -> Tensor | tuple[Tensor, ...]:
    """Calls a function once per row of its tensor inputs and joins the results.

    Matrix products and vectorised loops may round differently for other batch sizes and memory alignments, so every row
    is copied to its own memory and has the shapes of a batch of one.

    Args:
        function: takes the inputs, `pag_rows` and the options by keyword; returns a tensor or several.
        inputs: tensors whose first axis divides `rows` (tiled in order), and other values (passed on).
        rows: batch size B.
        pag_rows: number of rows at the end that are called with `pag_rows=1`.
        options: passed on.

    Returns:
        What `function` returns, for the whole batch.
    """
    inputs = {name: repeat_rows(value, rows) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    results = []
    for row in range(rows):
        own = {name: v[row : row + 1].clone() if isinstance(v, Tensor) else v for name, v in inputs.items()}
        results.append(function(**own, **options, pag_rows=int(row >= rows - pag_rows)))
    if isinstance(results[0], Tensor):
        return torch.cat(results)
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


def repeat_rows(tensor: Tensor, rows: int) -> Tensor:
    """(b, ...) -> (rows, ...): the b rows again and again in order, as guidance stacks its branches.

    Raises:
        ValueError: `rows` is no multiple of b.
    """
    if tensor.dim() == 0:
        return tensor.expand(rows)
    if tensor.shape[0] == rows:
        return tensor
    if rows % tensor.shape[0]:
        raise ValueError(f"a tensor of {tensor.shape[0]} rows cannot be repeated to a batch of {rows}.")
    return tensor.repeat(rows // tensor.shape[0], *[1] * (tensor.dim() - 1))
