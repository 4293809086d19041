"""The measuring tool: a small run, its counts against counted calls, and the committed table against its numbers."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sana.pipelines.denoise import TransformerDenoiser
from sana.pipelines.sana_pipeline import SanaPipeline
from tests.models.transformer.networks import inputs, small
from tools.measure_approximations import CASES, Case, Run, compare, draw, main, row_flops, table, weights_of
from tools.score_scenes import prompts

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "asset/models/sana_tiny"


@pytest.fixture(scope="module")
def pipeline() -> SanaPipeline:
    return SanaPipeline.from_pretrained(MODEL, device="cpu")


@pytest.mark.parametrize(
    "options",
    [{}, {"step_cache": 0.3}, {"interval_guidance": (0.6, 1.0)}, {"step_cache": 0.5, "interval_guidance": (0.6, 1.0)}],
)
def test_counted_rows_are_the_rows_that_run(pipeline, monkeypatch, options):
    rows, evaluate = [], TransformerDenoiser.__call__

    def counted(self, latents, sigma, branches):
        rows.append(len(latents) * len(branches))
        return evaluate(self, latents, sigma, branches)

    monkeypatch.setattr(TransformerDenoiser, "__call__", counted)
    run = draw(
        pipeline,
        prompts(1, 0, "unseen")[:1],
        Case("", options),
        argparse.Namespace(steps=6, cfg_scale=4.5, bs=1, seed=0),
    )
    assert run.rows == sum(rows)
    assert run.images.shape == (1, 3, 256, 256)


def test_flops_are_those_that_pytorch_counts():
    """All but the embeddings, the keys and values of the text, and the output layer, counted apart."""
    model, given = small(cross_attn_type="vanilla"), inputs(1, lengths=[10])
    with FlopCounterMode(display=False) as whole:  # with gradients, since oneDNN's products are not counted
        model(**given, batch_invariant=False)
    dim, tokens, text, caption = 32, 24, 10, 12
    apart = 2 * tokens * 4 * dim * 2 + 2 * text * (caption * dim + dim * dim)  # patches and output; captions
    apart += 2 * (256 * dim + dim * dim + dim * 6 * dim) + 2 * 2 * text * 2 * dim * dim  # time; keys and values
    denominator = 2 * 2 * tokens * dim  # of the linear attention in 2 blocks: a row of ones beside the values
    assert whole.get_total_flops() - apart - row_flops(model, tokens, text) == denominator


def test_numbers_of_a_comparison_by_hand():
    exact = Run(torch.ones(2, 1, 1, 1), torch.zeros(2, 3, 2, 2), rows=80, flops=4.0)
    images = torch.zeros(2, 3, 2, 2)
    images[1] = 0.1
    numbers = compare(Run(torch.full((2, 1, 1, 1), 1.5), images, rows=20, flops=1.0), exact)
    assert numbers["psnr_worst"] == pytest.approx(20, abs=1e-4)
    assert numbers["max_difference"] == pytest.approx(0.1)
    assert numbers["latent_rms_ratio"] == pytest.approx(0.5)
    assert (numbers["close"], numbers["rows_a_picture"], numbers["flops"]) == (0.5, 10, 0.25)
    assert compare(exact, exact)["psnr_median"] is None


def test_fp8_is_taken_back_after_its_case(pipeline):
    exact = pipeline.transformer
    with weights_of(Case("fp8", fp8={}), pipeline):
        assert pipeline.transformer is not exact
    assert pipeline.transformer is exact
    assert exact.state_dict()


def test_a_small_run_writes_numbers_and_table(tmp_path, capsys):
    files = {name: tmp_path / "out" / f"report.{name}" for name in ("json", "markdown")}
    outputs = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    chosen = ["--model", str(MODEL), "--n", "5", "--steps", "2", "--only", "12 text tokens"]
    assert main([*chosen, *outputs]) == 0
    report = json.loads(files["json"].read_text())
    assert [case["name"] for case in report["cases"]] == ["exact", "12 text tokens"]
    assert report["cases"][0]["psnr_worst"] is None and report["cases"][0]["flops"] == 1
    assert report["cases"][1]["rows_a_picture"] == 4
    assert files["markdown"].read_text() == table(report)
    assert table(report) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--n", "7"], "multiple of 5"), (["--only", "nothing"], "no case 'nothing'")]
)
def test_wrong_arguments(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_no_model_is_exit_code_1(tmp_path, capsys):
    assert main(["--model", str(tmp_path / "nowhere")]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_the_committed_table_is_that_of_the_committed_numbers():
    report = json.loads((ROOT / "asset/docs/approximations.json").read_text())
    assert [case["name"] for case in report["cases"]] == [case.name for case in CASES]
    assert table(report).strip() in (ROOT / "asset/docs/approximations.md").read_text()
