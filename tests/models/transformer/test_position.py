"""Position embeddings against direct formulas."""

import math

import pytest
import torch

from sana.models.transformer.position import apply_rotary, rotary_axes, rotary_table, sincos_2d


@pytest.mark.parametrize(("grid", "interpolation", "base"), [((3, 5), 1.0, 8), ((4, 2), 2.0, 4), ((1, 1), 0.5, 16)])
def test_sincos_equals_the_formula(grid: tuple[int, int], interpolation: float, base: int) -> None:
    table = sincos_2d(8, grid, interpolation, base)
    height, width = grid
    for row in range(height):
        for column in range(width):
            x, y = column * base / width / interpolation, row * base / height / interpolation
            expected = [f(v * w) for v in (x, y) for f in (math.sin, math.cos) for w in (1.0, 0.01)]
            assert table[row * width + column] == pytest.approx(expected, abs=1e-5)


def test_rotary_table_equals_the_formula() -> None:
    """Row angles first, then column angles, each for two neighbouring channels."""
    cosines, sines = rotary_table(rotary_axes(16), (3, 4))
    for row in range(3):
        for column in range(4):
            angles = [place * 10000 ** (-i / 4) for place in (row, column) for i in range(4) for _ in range(2)]
            assert cosines[row * 4 + column].tolist() == pytest.approx([math.cos(a) for a in angles], abs=1e-6)
            assert sines[row * 4 + column].tolist() == pytest.approx([math.sin(a) for a in angles], abs=1e-6)


def test_products_depend_on_the_offset_alone() -> None:
    query, key = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    table = rotary_table(rotary_axes(16), (6, 6))

    def product(first: tuple[int, int], second: tuple[int, int]) -> float:
        def at(place: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
            index = place[0] * 6 + place[1]
            return table[0][index : index + 1], table[1][index : index + 1]

        return float((apply_rotary(query, at(first)) * apply_rotary(key, at(second))).sum())

    assert product((0, 1), (2, 0)) == pytest.approx(product((3, 4), (5, 3)), abs=1e-4)
    assert product((0, 1), (2, 0)) != pytest.approx(product((0, 1), (3, 0)), abs=1e-3)


def test_16_bit_vectors_keep_their_dtype_and_length() -> None:
    x = torch.randn(1, 2, 12, 8).to(torch.bfloat16)
    turned = apply_rotary(x, rotary_table(rotary_axes(8), (3, 4)))
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned.float().norm(dim=-1), x.float().norm(dim=-1), rtol=1e-2, atol=0)


def test_impossible_widths() -> None:
    with pytest.raises(ValueError, match="multiple of 4, not 6"):
        sincos_2d(6, (2, 2))
    with pytest.raises(ValueError, match="multiple of 4, not 10"):
        rotary_axes(10)
