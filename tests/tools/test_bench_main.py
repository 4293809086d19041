"""The command line of the benchmarks: wrong words end with a suggestion and exit code 2, a run writes three files."""

import json

import pytest

from tools.bench import __main__ as command
from tools.bench import suites
from tools.bench.harness import Case, Comparison, Side
from tools.bench.results import Check


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "cpus"], "unknown suite 'cpus'. Did you mean 'cpu'? Known: cpu, gpu, quick, all"),
        (["--only", "operator"], "unknown part 'operator'. Did you mean 'operators'?"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--seconds", "-1"], "--seconds must be positive"),
        (["--seconds", "nan"], "--seconds must be positive"),
        (["--suit", "cpu"], "unrecognized arguments"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_the_gpu_suite_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        command.main(["--suite", "gpu"])
    assert caught.value.code == 2
    assert "this machine has none" in capsys.readouterr().err


def test_the_command_knows_all_parts():
    assert tuple(suites.PARTS) == command.PARTS


def test_a_list_measures_nothing(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command.main(["--list", "--suite", "quick", "--only", "scaling"]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("scaling: attention on 64 tokens")


@pytest.mark.parametrize("good", [True, False])
def test_a_run_writes_three_files_and_prints_the_table_last(tmp_path, capsys, monkeypatch, good):
    pytest.importorskip("matplotlib")

    def build():
        check = Check(1e-7 if good else 1e-2, 1e-5)
        return Comparison([Side("ours", dict), Side("diffusers", dict)], lambda: {"diffusers": check})

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(suites, "PARTS", {"dit": lambda setting: [Case("dit", "nothing at all", build)]})
    status = command.main(["--suite", "quick", "--rounds", "3", "--output", str(tmp_path)])
    assert status == (0 if good else 1)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name.rsplit("-", 1)[1] for name in names] == ["quick.json", "quick.md", "quick.png"]
    assert all(path.stat().st_size > 0 for path in tmp_path.iterdir())
    content = json.loads((tmp_path / names[0]).read_text())
    assert content["environment"]["command"].endswith(f"--suite quick --rounds 3 --output {tmp_path}")
    assert content["cases"][0]["status"] == ("measured" if good else "failed")
    shown = capsys.readouterr()
    assert shown.out.rstrip().splitlines()[-1].startswith("| training step 0.6B")
    assert ("nothing at all" in shown.out) and "written:" in shown.err


def test_what_does_not_fit_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    slow = Case("dit", "the slow one", lambda: pytest.fail("built"), seconds=100)
    monkeypatch.setattr(suites, "PARTS", {"dit": lambda setting: [slow]})
    assert command.main(["--suite", "quick", "--seconds", "5", "--output", str(tmp_path)]) == 0
    assert "skipped: dit, the slow one: needs about 100 s" in capsys.readouterr().out
