"""The load test of the server: statistics and verdicts by hand arithmetic; a reduced run as a slow test."""

import copy
import json

import pytest

from tools.bench.serve import GROWTH_MIB, build_parser, main, numbers, passed, percentile, table

CONTENT = {
    "environment": {
        "name": "CPU", "cores": 2, "date": "today", "versions": {"torch": "2"}, "load_before": 0.1, "command": "c",
    },
    "wish": {"steps": 3, "size": "auto"},
    "load": [{
        "clients": 2, "pictures": 9, "seconds": 3.0, "a_second": 3.0, "p50": 0.5, "p95": None, "p99": None,
        "failures": {},
    }],
    "hostile": {
        "requests": 5, "seconds": 1.0, "server_errors": 0, "hanging": 0, "healthy_after": True, "growth_mib": 1.0,
        "memory_mib": [(0, 100.0), (5, 101.0)], "statuses": {"slow": {"0": 2, "408": 3}},
    },
}  # fmt: skip


@pytest.mark.parametrize(("percent", "expected"), [(50, 2), (75, 3), (95, 4), (99, 4), (100, 4), (1, 1)])
def test_percentiles_are_values_that_occurred(percent, expected):
    assert percentile([4, 2, 1, 3], percent) == expected


def test_the_table_tells_everything():
    text = table(CONTENT)
    assert "| 2 | 9 | 3.00 | 0.50 | - | - |" in text and "| slow | 0: 2, 408: 3 |" in text
    assert "100 MiB before, 101 MiB after, +1.0 MiB" in text


def test_what_fails_a_run():
    assert passed(CONTENT)
    for place, value in (
        (("hostile", "server_errors"), 1), (("hostile", "hanging"), 1), (("hostile", "healthy_after"), False),
        (("hostile", "growth_mib"), GROWTH_MIB + 1), (("load", 0, "failures"), {"500": 1}),
        (("load", 0, "pictures"), 0),
    ):  # fmt: skip
        changed = copy.deepcopy(CONTENT)
        inner = changed
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        assert not passed(changed), place


def test_arguments():
    assert numbers("1,16") == [1, 16] and build_parser().parse_args([]).hostile == 10_000
    for wrong in (["--clients=0"], ["--clients=x"], ["--hostile=0"], ["--seconds=0"]):
        with pytest.raises(SystemExit) as ended:
            main(wrong)
        assert ended.value.code == 2


@pytest.mark.slow
def test_a_reduced_run_passes(tmp_path, capsys):
    code = main(["--clients=1,3", "--seconds=2", "--steps=2", "--size=64x64", "--hostile=300", f"--output={tmp_path}"])
    assert code == 0, capsys.readouterr().out
    (file,) = tmp_path.glob("serve-*.json")
    content = json.loads(file.read_text())
    assert content["passed"] and [one["clients"] for one in content["load"]] == [1, 3]
    assert sum(sum(counts.values()) for counts in content["hostile"]["statuses"].values()) == 300
    assert file.with_suffix(".md").read_text() == table(content)
