"""Results as JSON on standard output, logs on standard error: the commands whose other tests are in tests/tools."""

import json

from sana.commands import data_check, from_diffusers, quantize, to_diffusers
from sana.models import pipeline_folder
from tests.tiny_model import make_model_folder


def test_quantize(tmp_path, capsys):
    folder, out = make_model_folder(tmp_path / "tiny"), tmp_path / "out"
    capsys.readouterr()
    assert quantize.main(["--model_path", str(folder), "--scheme", "int8", "--output", str(out), "--json"]) == 0
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    assert json.loads(capsys.readouterr().out) == {"path": str(out), "bytes": size}


def test_data_check_prints_the_report_or_writes_it(tmp_path, capsys):
    place = "asset/example_data"
    code = data_check.main([place, "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert data_check.main([place, "--json", str(tmp_path / "new" / "report.json")]) == code
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == printed and printed["images"] > 0
    assert f"{printed['images']} images" in capsys.readouterr().out


def test_to_diffusers(tmp_path, capsys):
    folder = make_model_folder(tmp_path / "tiny")
    assert to_diffusers.main(["--orig_ckpt_path", str(folder), "--dump_path", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(tmp_path / "out"), "full_pipeline": False}
    assert to_diffusers.main(["--orig_ckpt_path=nowhere", "--dump_path=x", "--json"], prog="sana convert x") == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.splitlines()[-1].startswith("sana convert x: ")


def test_from_diffusers(monkeypatch, capsys):
    monkeypatch.setattr(pipeline_folder, "import_pipeline", lambda *given, **more: ["y_embedder.y_embedding"])
    assert from_diffusers.main(["--diffusers_path=a", "--dump_path=b.pth", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": "b.pth", "reinitialised": ["y_embedder.y_embedding"]}
