"""The load test of the server: verdicts by hand, files, and a quick run as a slow test."""

import copy
import json

import pytest

from tests.tools.bench.serving_results import CONTENT
from tools.bench.hostile import KINDS
from tools.bench.serve import build_parser, complaints, main, numbers, write
from tools.bench.serving_report import markdown


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("hostile", "server_errors"), 1, "1 server errors"),
        (("hostile", "hanging"), 1, "without an answer"),
        (("hostile", "healthy_after"), False, "not healthy"),
        (("hostile", "same_picture"), False, "not the offline one"),
        (("hostile", "wrong_errors"), {"slow: 400 has another form": 2}, "slow: 400 has another form"),
        (("load", 0, "failures"), {"500": 1}, "instead of pictures"),
        (("one_at_a_time", 0, "failures"), {"0": 1}, "instead of pictures"),
    ],
)
def test_what_fails_a_run(place, value, words):
    assert complaints(CONTENT) == []
    changed = copy.deepcopy(CONTENT)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (found,) = complaints(changed)
    assert words in found


@pytest.mark.parametrize(("flat", "expected"), [(True, []), (False, ["memory drifts"]), (None, [])])
def test_memory_counts_where_there_was_a_verdict(flat, expected):
    changed = copy.deepcopy(CONTENT)
    changed["hostile"]["memory"] |= {"flat": flat, "reasons": ["memory drifts"] if flat is not True else []}
    assert complaints(changed) == expected


def test_arguments():
    assert numbers("1,16") == [1, 16] and build_parser().parse_args([]).hostile == 10_000
    for wrong in (["--clients=0"], ["--clients=x"], ["--hostile=49"], ["--seconds=0"]):
        with pytest.raises(SystemExit) as ended:
            main(wrong)
        assert ended.value.code == 2


def test_files(tmp_path):
    write(CONTENT, tmp_path / "new")
    assert sorted(one.name for one in (tmp_path / "new").iterdir()) == ["serving-cpu.json", "serving-cpu.md"]
    assert json.loads((tmp_path / "new/serving-cpu.json").read_text())["load"] == CONTENT["load"]
    assert (tmp_path / "new/serving-cpu.md").read_text() == markdown(CONTENT)


@pytest.mark.slow
def test_a_quick_run_passes(tmp_path, capsys):
    code = main(["--quick", "--clients=1,3", f"--output={tmp_path}"])
    shown = capsys.readouterr().out
    assert code == 0, shown
    (file,) = tmp_path.glob("serving-*.json")
    content = json.loads(file.read_text())
    assert content["passed"] and [one["clients"] for one in content["load"]] == [1, 3]
    assert content["hostile"]["same_picture"] and content["hostile"]["requests"] == 150
    assert set(content["hostile"]["statuses"]) == set(KINDS)
    assert shown.endswith(file.with_suffix(".md").read_text() + "\n")
