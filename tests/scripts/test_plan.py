"""scripts/plan.py: its options, exit codes, one-sentence errors, and the command as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sana.pipelines import command
from scripts.plan import build_parser, main

ROOT = Path(__file__).parents[2]
CONFIG = f"--config={ROOT / 'configs/sana_config/1024ms/Sana_1600M_img1024.yaml'}"


def run_failing(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Returns the exit code and the error line; asserts that there is one line and no traceback."""
    code = main(arguments)
    shown = capsys.readouterr().err
    errors = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in shown
    return code, errors[0]


def test_help_is_fast_because_nothing_heavy_is_imported():
    code = (
        "import sys; sys.argv = ['x', '--help']; import scripts.plan as s\ntry: s.main()\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--max_vram" in done.stdout


def test_as_a_user_runs_it(tmp_path: Path):
    """Without arguments: the bundled model, from any folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/plan.py")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("SanaMS_Tiny_P1: 1 picture of 256 x 256 px, fp32 on cpu, guidance")
    assert "denoising" in done.stdout


def test_json_of_a_plan_and_of_a_refusal(model_folder: Path, capsys: pytest.CaptureFixture[str]):
    common = [f"--model_path={model_folder}", "--device=cpu", "--json"]
    assert main([*common, "--max_vram=1GB", "--batch=2"]) == command.OK
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] is True
    assert plan["needed"] == max(stage["total"] for stage in plan["stages"]) <= plan["allowed"] == 10**9
    fixed = ["--quantization=none", "--text_quantization=none", "--tiling=none"]
    assert main([*common, "--max_vram=1kB", *fixed]) == command.DOES_NOT_FIT
    shown = capsys.readouterr()
    refusal = json.loads(shown.out)
    assert refusal["fits"] is False
    assert refusal["needed"] > refusal["allowed"] == 1000
    assert refusal["message"] in shown.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--batch=0"], "batch must be a whole number from 1"),
        (["--max_vram=8"], "max_vram 8 has no unit; write 8GB"),
        (["--max_vram=lots"], "such as 8GB"),
        (["--quantization=int7"], "Did you mean 'int8'"),
        (["--offload=group", "--device=cpu"], "no effect with device cpu"),
        (["--height=1000", "--binning=false"], "use 992 or 1024"),
        (["--model.image_size=512x"], "wrong type"),
        (["--train", "--pag"], "pag has no effect with train"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
):
    code, error = run_failing([CONFIG, *arguments], capsys)
    assert code == command.USAGE
    assert told in error


@pytest.mark.parametrize("arguments", [["--hieght=512"], ["--tiling=small"], ["--packing=maybe"], ["--height=x"]])
def test_an_argument_that_cannot_be_read_is_wrong_usage(arguments: list[str]):
    with pytest.raises(SystemExit) as caught:
        main([CONFIG, *arguments])
    assert caught.value.code == command.USAGE


def test_weights_that_are_not_here_are_not_fetched(capsys: pytest.CaptureFixture[str]):
    code, error = run_failing(["--model_path=Efficient-Large-Model/Sana_1600M_1024px"], capsys)
    assert code == command.USAGE
    assert "a plan fetches no weights" in error


def test_every_option_is_read():
    options = {option for action in build_parser()._actions for option in action.option_strings}
    asked = "config model_path height width batch dtype quantization text_quantization device guidance pag max_vram"
    assert {f"--{name}" for name in f"{asked} offload tiling train json no_text_encoder margin".split()} <= options
