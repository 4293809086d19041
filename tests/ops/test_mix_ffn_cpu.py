"""The Mix-FFN of a CPU in chunks of rows: the result of the whole image, whatever the batch, in bounded memory."""

import pytest
import torch
from torch import Tensor

from sana.ops.mix_ffn import cpu
from sana.ops.mix_ffn.cpu import chunk_rows, mix_ffn_cpu
from sana.ops.mix_ffn.reference import mix_ffn
from sana.pipelines.memory.tracker import MemoryTracker
from tests.tolerance import assert_rms_close

DIM, HIDDEN, OUT = 24, 40, 16


def draw(dtype: torch.dtype, kernel: int, biases: bool) -> list[tuple[Tensor, Tensor | None]]:
    shapes = [(2 * HIDDEN, DIM, 1, 1), (2 * HIDDEN, 1, kernel, kernel), (OUT, HIDDEN, 1, 1)]
    return [
        (
            (torch.randn(shape) / (shape[1] * shape[2] ** 2) ** 0.5).to(dtype),
            torch.randn(shape[0]).to(dtype) if biases else None,
        )
        for shape in shapes
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("grid", "rows", "kernel", "dilation"),
    [((7, 5), 2, 3, 1), ((12, 3), 5, 3, 1), ((9, 4), 4, 3, 2), ((11, 6), 4, 5, 1), ((5, 8), 1, 1, 1)],
)
def test_chunks_of_rows_give_the_whole_image(monkeypatch, dtype, grid, rows, kernel, dilation) -> None:
    layers = draw(dtype, kernel, biases=kernel != 5)
    x = torch.randn(2, grid[0] * grid[1], DIM).to(dtype)
    reach, token = kernel // 2 * dilation, HIDDEN * x.element_size()
    with torch.no_grad():
        assert chunk_rows(grid, token, reach) == grid[0]
        whole = mix_ffn_cpu(x, grid, *layers, dilation=dilation)
        monkeypatch.setattr(cpu, "CHUNK_BYTES", rows * grid[1] * token)
        assert chunk_rows(grid, token, reach) < grid[0]
        chunked = mix_ffn_cpu(x, grid, *layers, dilation=dilation)
        alone = mix_ffn_cpu(x[1:], grid, *layers, dilation=dilation)
        wide = [(weight.double(), None if bias is None else bias.double()) for weight, bias in layers]
        judge = mix_ffn(x.double(), grid, *wide, dilation=dilation)
    assert torch.equal(alone[0], chunked[1])
    assert_rms_close(chunked, whole)
    assert_rms_close(chunked, judge, dtype)


def test_chunks_are_about_equal_and_no_larger_than_allowed() -> None:
    for height in range(1, 200):
        for width in (3, 64, 128, 250):
            rows = chunk_rows((height, width), 5600 * 4, 1)
            chunks = -(-height // rows)
            assert rows * width * 5600 * 4 <= cpu.CHUNK_BYTES or rows == 2
            assert height - rows * (chunks - 1) > 0 and chunks == -(-height // rows)
            assert rows == height or (chunks - 1) * cpu.CHUNK_BYTES < height * width * 5600 * 4 * 2
    assert chunk_rows((32, 32), 5600 * 4, 1) == 32  # 1024 px of the 1.6B model in float32: one piece


def test_a_chunk_never_has_fewer_rows_than_its_neighbours_need(monkeypatch) -> None:
    monkeypatch.setattr(cpu, "CHUNK_BYTES", 1)
    assert [chunk_rows((40, 9), 4, reach) for reach in (0, 1, 2, 3)] == [1, 2, 4, 6]


def test_what_is_made_on_the_way_is_a_few_chunks(monkeypatch) -> None:
    layers, grid, chunk = draw(torch.float32, 3, biases=True), (60, 16), 6 * 16 * HIDDEN * 4
    x = torch.randn(2, 60 * 16, DIM)

    def made() -> int:
        with torch.no_grad():
            mix_ffn_cpu(x, grid, *layers)  # packs the weights
            with MemoryTracker() as tracker:
                out = mix_ffn_cpu(x, grid, *layers)
        return tracker.peak - out.nbytes

    whole = made()
    monkeypatch.setattr(cpu, "CHUNK_BYTES", chunk)
    # value, expansion, the same with its carried rows, and those rows; the tracker counts the input that was cut, too
    assert made() - x.nbytes <= 5 * chunk < whole / 5
