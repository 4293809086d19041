"""The command that compares predicted and measured training steps."""

import json

import pytest

from tools.measure_memory import Row
from tools.measure_training_memory import main, parse_args


def test_the_command_writes_its_rows(tmp_path, capsys) -> None:
    overrides = ["--train.extra.train_text_encoder=false", "--train.optimizer={type: CAME8BitWrapper, lr: 1e-4}"]
    file = tmp_path / "rows.json"
    main(["--batch", "2", "--checkpointing", "ffn", "blocks", "--json", str(file), *overrides])
    assert capsys.readouterr().out.count("train ") == 2
    rows = [Row(**row) for row in json.loads(file.read_text())]
    assert [row.stage for row in rows] == ["train ffn", "train blocks"]
    assert all(row.ratio == pytest.approx(1, abs=0.1) for row in rows)


def test_what_is_no_option_is_an_override() -> None:
    args = parse_args(["--batch", "3", "--model.mixed_precision=fp32"])
    assert (args.batch, args.overrides) == (3, ["--model.mixed_precision=fp32"])
