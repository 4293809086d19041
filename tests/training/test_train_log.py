"""The log survives a kill at any byte; rates against their arithmetic; the bar keeps to standard error."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sana.training.train_log import Throughput, TrainLog, describe, progress_bar, read_train_log


def record(step):
    return {"step": step, "epoch": step // 5, "loss": 1 / step, "lr": 1e-4, "note": "fünf" if step == 5 else None}


def write_steps(path, first, last, *, resume_step=0):
    log = TrainLog(path, resume_step=resume_step)
    for step in range(first, last + 1):
        log.write(record(step))
    log.close()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_run_killed_at_any_byte_and_resumed_leaves_the_log_of_an_unbroken_one(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("log")
    write_steps(folder / "unbroken.jsonl", 1, 12)
    whole = (folder / "unbroken.jsonl").read_bytes()
    checkpoint = data.draw(st.integers(0, 12), label="checkpoint")
    kept = len(b"".join(whole.splitlines(keepends=True)[:checkpoint]))
    killed = folder / "killed.jsonl"
    killed.write_bytes(whole[: data.draw(st.integers(kept, len(whole)), label="bytes")])
    write_steps(killed, checkpoint + 1, 12, resume_step=checkpoint)
    assert killed.read_bytes() == whole
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_numbers_that_are_not_finite_are_null_in_strict_json(tmp_path):
    log = TrainLog(tmp_path / "new" / "train_log.jsonl")
    log.write({
        "step": torch.tensor(3), "loss": math.nan, "grad_norm": torch.tensor(math.inf), "lr": np.float32(0.5),
        "skipped": True, "losses": [1.0, -math.inf],
    })  # fmt: skip
    log.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    line = (tmp_path / "new" / "train_log.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse) == {
        "step": 3, "loss": None, "grad_norm": None, "lr": 0.5, "skipped": True, "losses": [1.0, None],
    }  # fmt: skip


def test_every_line_is_on_file_before_the_next_step(tmp_path):
    log = TrainLog(tmp_path / "log.jsonl")
    log.write(record(1))
    assert read_train_log(tmp_path / "log.jsonl") == [log.last] == [record(1)]
    log.close()


def test_what_is_no_record_is_dropped_and_said(tmp_path, caplog):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n\xff\xfe\n[3]\n{"step": "x"}\n{"step": 2}\n{"step": 3}')
    with caplog.at_level("WARNING", logger="sana"):
        log = TrainLog(path, resume_step=9)
    assert log.last == {"step": 2}
    assert path.read_bytes() == b'{"step": 1, "loss": 2.0}\n{"step": 2}\n'
    assert "4 line(s)" in caplog.text
    log.close()


def test_a_value_of_no_json_kind_is_an_error(tmp_path):
    log = TrainLog(tmp_path / "log.jsonl")
    with pytest.raises(TypeError, match="cannot hold"):
        log.write({"step": 1, "what": object()})
    assert (tmp_path / "log.jsonl").read_bytes() == b""
    log.close()


def test_a_full_disk_costs_records_and_not_the_run(tmp_path, monkeypatch, caplog):
    log = TrainLog(tmp_path / "log.jsonl")
    log.write(record(1))
    real = __import__("os").write
    monkeypatch.setattr("sana.training.train_log.os.write", lambda fd, line: real(fd, line[:7]))
    log.write(record(2))
    log.write(record(3))
    monkeypatch.undo()
    log.write(record(4))
    log.close()
    assert [one["step"] for one in read_train_log(log.path)] == [1, 4]
    assert caplog.text.count("cannot be written") == 1


def test_other_processes_leave_the_file_alone(tmp_path, monkeypatch, capfd):
    write_steps(tmp_path / "log.jsonl", 1, 4)
    monkeypatch.setenv("RANK", "1")
    write_steps(tmp_path / "log.jsonl", 1, 2)
    assert len(read_train_log(tmp_path / "log.jsonl")) == 4
    with progress_bar(10) as bar:
        bar.update(3)
    assert capfd.readouterr() == ("", "")


def test_the_bar_is_on_standard_error(capfd):
    with progress_bar(10, step=4) as bar:
        bar.update(6)
        bar.set_postfix_str(describe(record(4) | {"grad_norm": None}, 3725))
    out, err = capfd.readouterr()
    assert out == ""
    assert "10/10" in err


@pytest.mark.parametrize(
    ("values", "left", "text"),
    [
        ({"loss": 0.25, "lr": 1e-4, "grad_norm": 2.0}, None, "loss 0.2500, lr 1.00e-04, grad 2.000"),
        ({"loss": None, "images_per_second": 1234.5}, 59.6, "loss -, 1234 images/s, 0:01:00 left"),
        ({}, 360000.0, "100:00:00 left"),
    ],
)
def test_the_text_beside_the_bar(values, left, text):
    assert describe(values, left) == text


def test_rates_count_the_window_and_leave_pauses_out():
    now = [100.0]
    rate = Throughput(50, step=10, seconds=1000.0, window=4, clock=lambda: now[0])
    assert (rate.images_per_second, rate.seconds_left) == (0.0, None)
    for step in range(11, 21):
        now[0] += 5.0 if step < 16 else 2.0
        rate.update(step, 8)
        with rate.paused():
            now[0] += 30.0
    assert rate.images_per_second == pytest.approx(8 / 2.0)
    assert rate.seconds_left == pytest.approx(30 * 2.0)
    assert rate.seconds == pytest.approx(1000 + 5 * 5 + 5 * 2 + 10 * 30)
