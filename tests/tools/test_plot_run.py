"""The plot draws every curve of the logs; runs that cannot be drawn give one sentence and an exit code."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tools.plot_run import COLOURS, main, read_run, run_names, skipped_steps, smooth


def write_log(folder, records):
    folder.mkdir()
    (folder / "train_log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder


@pytest.fixture
def run(tmp_path):
    records = [
        {"step": step, "loss": 1 / step, "lr": 1e-4, "grad_norm": 0.5, "images_per_second": 8.0, "seconds": step}
        for step in range(1, 21)
    ]
    records[9] |= {"loss": None, "skipped": True}
    return write_log(tmp_path / "one", records)


def test_curves_and_skipped_steps_are_read(run):
    with (run / "train_log.jsonl").open("a") as file:
        file.write('{"step": 21, "lo')  # a run that goes on while it is drawn
    read = read_run(run, "one")
    steps, losses = read.curves["loss"]
    assert steps == [step for step in range(1, 21) if step != 10]
    assert losses == [1 / step for step in steps]
    assert read.curves["lr"] == (list(range(1, 21)), [1e-4] * 20)
    assert read.skipped == [10]


@pytest.mark.parametrize(
    ("records", "steps"),
    [
        ([{"step": 1, "skipped": 0}, {"step": 2, "skipped": 2}, {"step": 3, "skipped": 2}], [2]),  # a count
        ([{"step": 1, "skipped": False}, {"step": 2, "skipped": True}, {"step": 3}], [2]),
        ([{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}, {"step": 3, "epoch": 1}], [2]),
    ],
)
def test_how_a_record_tells_of_a_skipped_step(records, steps):
    assert skipped_steps(records) == steps


def test_the_running_mean_does_not_lag():
    line = [0.5 * index - 3 for index in range(40)]
    assert smooth(line, 9)[4:-4] == pytest.approx(line[4:-4])
    assert smooth(line, 9)[-1] == pytest.approx(sum(line[-5:]) / 5)  # the end is not the last reading alone
    spike = [0.0] * 10 + [9.0] + [0.0] * 10
    assert smooth(spike, 9) == pytest.approx([0.0] * 6 + [1.0] * 9 + [0.0] * 6)
    assert smooth([3.0], 5) == [3.0]
    assert smooth([3.0, 1.0], 1) == [3.0, 1.0]


def has_colour(picture, colour):
    wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return int((np.abs(picture.astype(int) - wanted).max(-1) < 8).sum())


def test_every_run_has_its_curves_in_every_panel(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    other = write_log(
        tmp_path / "two",
        [{"step": n, "loss": 2.0, "lr": 2e-4, "grad_norm": 9.0**n, "images_per_second": 4} for n in (1, 9, 20)],
    )
    out = tmp_path / "new" / "compare.png"
    assert main([str(run), str(other / "train_log.jsonl"), "--out", str(out), "--log_loss"]) == 0
    picture = np.asarray(Image.open(out).convert("RGB"))
    height, width = picture.shape[:2]
    assert width > 1000
    for rows in (slice(height // 2), slice(height // 2, height)):
        for columns in (slice(width // 2), slice(width // 2, width)):
            panel = picture[rows, columns]
            assert has_colour(panel, COLOURS[0]) > 100
            assert has_colour(panel, COLOURS[1]) > 100
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["one: loss 0.0500 at step 20, 1 skipped", "two: loss 2.0000 at step 20, 0 skipped", str(out)]
    assert [path.name for path in out.parent.iterdir()] == ["compare.png"]


def test_the_picture_stands_beside_the_log(run):
    pytest.importorskip("matplotlib")
    assert main([str(run)]) == 0
    assert (run / "train_log.png").is_file()


def test_a_run_of_one_record_shows_a_dot(tmp_path):
    pytest.importorskip("matplotlib")
    folder = write_log(tmp_path / "short", [{"step": 5, "loss": 0.5}])
    assert main([str(folder)]) == 0
    picture = np.asarray(Image.open(folder / "train_log.png").convert("RGB"))
    assert has_colour(picture[picture.shape[0] // 8 : picture.shape[0] // 2], COLOURS[0]) > 5


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "No such file"), ("", "no record"), ('{"step": 1, "note": "x"}\n', "no record"), ("\x00\n", "no record")],
)
def test_a_log_that_cannot_be_drawn(tmp_path, capsys, content, words):
    if content is not None:
        (tmp_path / "train_log.jsonl").write_text(content)
    assert main([str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert words in message
    assert len(message.splitlines()) == 1


def test_without_matplotlib_the_extra_is_named(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([str(run)]) == 1
    assert "sana-python[plot]" in capsys.readouterr().err


def test_a_picture_that_cannot_be_written(run, capsys):
    pytest.importorskip("matplotlib")
    (run / "file").touch()
    for out in (run / "file" / "x.png", run / "picture.unknown"):
        assert main([str(run), "--out", str(out)]) == 1
    assert not list(run.glob(".*"))
    assert capsys.readouterr().err.count("error: ") == 2


@pytest.mark.parametrize("arguments", [[], ["run", "--smooth", "0"]])
def test_wrong_arguments(arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


def test_names_tell_runs_apart(tmp_path):
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "b" / "run2" / "train_log.jsonl"]
    assert run_names(paths) == ["a/run", "b/run", "b/run2"]
    assert run_names([tmp_path / "a" / "run"] * 2) == ["run", "run"]


def test_it_is_a_program(run):
    pytest.importorskip("matplotlib")
    done = subprocess.run([sys.executable, "tools/plot_run.py", str(run)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert math.isclose(float(done.stdout.split()[2]), 0.05)
