"""The self-test command: table, JSON and exit codes, alone and under torchrun."""

import json
import subprocess

import pytest

from tests.training.conftest import *  # noqa: F403  its fixtures
from tests.training.conftest import TINY_YAML
from tests.training.distributed_runs import ROOT, environment, torchrun
from tools.selftest import main


def test_table_json_and_success(image_options, tmp_path, capsys):
    report = tmp_path / "out/report.json"
    arguments = [TINY_YAML, *image_options, "--minutes", "0", "--only", "data", "ema", "--json", str(report)]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["build", "ok"], ["data", "ok"], ["ema", "ok"]]
    content = json.loads(report.read_text())
    assert content["passed"] is True
    assert [check["status"] for check in content["checks"]] == ["ok"] * 3
    assert content["checks"][1]["numbers"]["samples"] == 10


def test_a_failed_check_is_exit_code_1(image_options, tmp_path, capsys):
    (tmp_path / "nothing").mkdir()
    assert main([TINY_YAML, *image_options, f"--data.data_dir=[{tmp_path / 'nothing'}]", "--only", "data"]) == 1
    shown = capsys.readouterr()
    assert "failed" in shown.out and "skipped" in shown.out and "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "nowhere.yaml"),
        ([], "CONFIG"),
        ([TINY_YAML, "--train.sede=1"], "train.seed"),
        ([TINY_YAML, "--minutes", "-1"], "--minutes must not be negative"),
        ([TINY_YAML, "--scratch", "nowhere"], "--scratch nowhere is no folder"),
        ([TINY_YAML, "--only", "emma"], "There is no check 'emma'"),
        ([TINY_YAML, "--data.type=SanaImgDatset"], "SanaImgDataset"),
    ],
)
def test_wrong_usage_is_exit_code_2(capsys, arguments, message):
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_two_processes_agree(image_options, tmp_path):
    options = [*image_options, "--minutes", "0", "--only", "accumulation", "processes", "resume"]
    result = subprocess.run(
        torchrun("tools/selftest.py", TINY_YAML, *options, f"--json={tmp_path / 'report.json'}"),
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line.split()[:2] for line in result.stdout.splitlines()]
    assert lines == [[name, "ok"] for name in ("build", "accumulation", "processes", "resume")], result.stdout
