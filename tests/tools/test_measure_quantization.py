"""The measuring tool: a small run, its bytes against the schemes', and the committed table against its numbers."""

import json
from pathlib import Path

import pytest
import torch

from sana.models.quantization.kernels import require
from sana.models.quantization.layers import is_quantized, matches, plain_name
from sana.models.quantization.schemes import SCHEMES, quantized_bytes
from sana.pipelines.sana_pipeline import SanaPipeline
from tools.measure_quantization import CASES, REFERENCE, Case, cases_here, held, load, main, table

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "asset/models/sana_tiny"


def test_every_scheme_has_its_rows_emulated_where_a_cpu_cannot_run_them():
    for column in ("transformer", "text_encoder"):
        assert {getattr(case, column) for case in CASES} >= set(SCHEMES)
    for case in CASES:
        for scheme in filter(None, (case.transformer, case.text_encoder)):
            runs = True
            try:
                require(scheme, torch.device("cpu"))
            except ValueError:
                runs = False
            assert runs != case.emulated, scheme
            assert ("(emulated)" in case.name) == case.emulated
    assert cases_here() == list(CASES)


@pytest.mark.parametrize("case", [case for case in CASES if case.emulated], ids=lambda case: case.name)
def test_an_emulated_case_has_the_bytes_of_its_scheme(case):
    def expected(network, exact, scheme, keep):
        total = 0
        for name, one in exact.state_dict().items():
            small = name.endswith("weight") and is_quantized(network, name) and scheme
            kept = matches(plain_name(name.removesuffix(".weight")), keep)
            total += quantized_bytes(one.shape, scheme, one.dtype) if small and not kept else one.nbytes
        return total

    exact, pipeline = load(Case(""), str(MODEL)), load(case, str(MODEL))
    found = held(pipeline)
    assert found["transformer_bytes"] == expected("transformer", exact.transformer, case.transformer, case.keep)
    text = held(exact)["text_encoder_bytes"]
    assert (found["text_encoder_bytes"] < 0.6 * text) == bool(case.text_encoder)
    assert found["text_encoder_bytes"] <= text


def test_emulated_rows_are_added_to_a_report(tmp_path, capsys):
    file, given = tmp_path / "a.json", ["--n", "5", "--steps", "1", "--rounds", "1", "--json", str(tmp_path / "a.json")]
    name = "fp8 (emulated)"
    assert main([*given, "--add"]) == 1 and "a.json" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*given, "--add", "--only", "int8"])
    assert main([*given, "--only", REFERENCE]) == 0
    before = json.loads(file.read_text())
    assert main([*given, "--steps", "2", "--add", "--only", name]) == 1 and "steps 1" in capsys.readouterr().err
    assert json.loads(file.read_text()) == before
    assert main([*given, "--add", "--only", name]) == 0
    report = json.loads(file.read_text())
    assert report["cases"][0] == before["cases"][0] and report["command"] == before["command"]
    row = report["cases"][1]
    assert row["name"] == name and row["psnr_median"] > 10 and "seconds" not in row and "peak_bytes" not in row
    assert name in report["emulated"]["command"]
    lines = table(report).splitlines()
    assert sum("not measured yet (needs CUDA)" in line for line in lines if line.startswith("| fp8")) == 1
    assert "Emulated rows" in table(report) and "Emulated rows" not in table(before)


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_bytes_are_those_of_the_schemes(scheme):
    exact = SanaPipeline.from_pretrained(MODEL, device="cpu", dtype="bf16").transformer
    expected = sum(
        quantized_bytes(one.shape, scheme, one.dtype)
        if name.endswith("weight") and is_quantized("transformer", name)
        else one.nbytes
        for name, one in exact.state_dict().items()
    )
    assert held(load(Case("", transformer=scheme), str(MODEL)))["transformer_bytes"] == expected


def test_a_small_run(tmp_path, capsys):
    files = ["--json", str(tmp_path / "a.json"), "--markdown", str(tmp_path / "a.md")]
    given = ["--model", str(MODEL), "--n", "5", "--steps", "2", "--rounds", "2", "--only", "int8", "--machine", "M"]
    assert main([*given, *files]) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    exact, coarse = report["cases"]
    assert (exact["name"], coarse["name"]) == ("bf16", "int8") and report["machine"] == "M"
    assert exact["psnr_median"] is None and exact["ms_ssim_worst"] == pytest.approx(1) and exact["ratio"] == 1
    assert 25 < coarse["psnr_worst"] <= coarse["psnr_median"] and 0.9 < coarse["ms_ssim_worst"] < 1
    assert coarse["transformer_bytes"] < 0.6 * exact["transformer_bytes"] and coarse["seconds"] > 0
    parts = ("transformer", "text_encoder", "autoencoder", "packed", "allocated")
    for case in (exact, coarse):
        assert case["peak_bytes"] == sum(case[f"{part}_bytes"] for part in parts) and case["allocated_bytes"] > 0
    assert (tmp_path / "a.md").read_text() == table(report)
    assert "tools/measure_quantization.py" in report["command"] and table(report) in capsys.readouterr().out


def test_wrong_arguments_and_models(tmp_path, capsys):
    for wrong in (["--n", "3"], ["--rounds", "0"], ["--only", "int3"]):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)
    assert main(["--model", str(tmp_path / "none"), "--only", "int8"]) == 1
    assert "error:" in capsys.readouterr().err


def test_the_committed_table_is_that_of_its_numbers():
    file = ROOT / "asset/docs/quantization.json"
    if not file.is_file():
        pytest.skip("not measured yet")
    report = json.loads(file.read_text())
    assert file.with_suffix(".md").read_text() == table(report)
