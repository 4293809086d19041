"""Calling a function once per row."""

import pytest
import torch

from sana.models.transformer.rows import call_by_row, repeat_rows


def test_rows_are_tiled_in_order() -> None:
    assert repeat_rows(torch.tensor([1, 2]), 6).tolist() == [1, 2, 1, 2, 1, 2]
    assert repeat_rows(torch.tensor(7), 2).tolist() == [7, 7]
    with pytest.raises(ValueError, match="2 rows cannot be repeated to a batch of 3"):
        repeat_rows(torch.zeros(2, 1), 3)


def test_every_row_is_called_alone_and_the_last_are_perturbed() -> None:
    seen = []

    def function(
        x: torch.Tensor, y: torch.Tensor, *, factor: float, pag_rows: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append((x.shape[0], pag_rows, x.data_ptr() % 64))
        return x * factor, y

    x = torch.arange(9.0).view(3, 3)
    doubled, same = call_by_row(function, {"x": x, "y": x[:1]}, 3, 1, {"factor": 2.0})
    assert torch.equal(doubled, 2 * x) and torch.equal(same, x[:1].expand(3, 3))
    assert seen == [(1, 0, 0), (1, 0, 0), (1, 1, 0)]
