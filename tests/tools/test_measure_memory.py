"""The measuring side of the memory model: counts of allocations, and the table it prints."""

import json

import pytest
import torch

from tools.measure_memory import Row, StandInTokenizer, main, measured_peak, peak_of, table


def test_the_peak_of_a_list_of_events() -> None:
    assert peak_of([]) == 0
    assert peak_of([(0, 5), (1, 7), (2, -5), (3, 4), (4, -11)]) == 12


def test_every_allocation_of_a_run_is_seen() -> None:
    def run() -> torch.Tensor:
        first = torch.zeros(2**18)  # 1 MiB
        second = first + 1
        del first
        return second * 2

    assert measured_peak(run, "cpu") == pytest.approx(2 * 2**20, abs=100)


def test_the_stand_in_pads_and_cuts_like_a_tokenizer() -> None:
    tokens = StandInTokenizer()(["a" * 40, "", "a" * 400], max_length=16)
    assert tokens["attention_mask"].sum(dim=1).tolist() == [10, 1, 16]
    assert tokens["input_ids"].shape == (3, 16)


def test_rows_as_text() -> None:
    row = Row("tiny", "decode", "autoencoder", 256, 256, 1, "fp32", "cpu", 2**20, 3 * 2**20, 2**20, 2**20)
    assert row.ratio == 2
    assert table([row]).splitlines()[1].split() == ["decode", "1.0", "1.0", "3.0", "1.0", "4.0", "2.0", "2.000"]


def test_the_command_writes_its_rows(tmp_path, capsys) -> None:
    main(["--height", "128", "--width", "192", "--stages", "denoise", "picture", "--json", str(tmp_path / "rows.json")])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["stage", "denoise", "picture"]
    rows = [Row(**row) for row in json.loads((tmp_path / "rows.json").read_text())]
    assert [(row.stage, row.height, row.width) for row in rows] == [("denoise", 128, 192), ("picture", 128, 192)]
    assert all(row.ratio == pytest.approx(1, abs=0.05) for row in rows)
