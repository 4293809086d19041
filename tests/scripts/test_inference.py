"""scripts/inference.py: its flags, exit codes, one-sentence errors, and the command as a user runs it."""

import dataclasses
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sana.models.weights import load_state_dict
from sana.pipelines import batch, command, loading
from sana.pipelines.images import read_recipe
from sana.pipelines.options import InferenceOptions
from scripts.inference import build_parser, main, numbers, tiles

ROOT = Path(__file__).parents[2]
OFFICIAL_FLAGS = (
    "config model_path txt_file json_file work_dir version sample_nums bs cfg_scale pag_scale sampling_algo seed "
    "dataset step add_label tar_and_del exist_time_prefix gpu_id custom_image_size start_index end_index "
    "interval_guidance ablation_selections ablation_key debug if_save_dirname"
)


@pytest.fixture
def arguments(model_folder: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n", encoding="utf-8")
    return [
        f"--model_path={model_folder}", f"--txt_file={tmp_path / 'prompts.txt'}", f"--work_dir={tmp_path / 'out'}",
        "--step=1", "--device=cpu",
    ]  # fmt: skip


def run_failing(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Returns the exit code and the error line; asserts that there is one line and no traceback."""
    code = main(arguments)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return code, errors[0]


def test_official_flags_have_their_names():
    known = {option for action in build_parser()._actions for option in action.option_strings}
    assert {f"--{name}" for name in OFFICIAL_FLAGS.split()} <= known


def test_help_is_fast_because_nothing_heavy_is_imported():
    code = (
        "import sys; sys.argv = ['x', '--help']; import scripts.inference as s\ntry: s.main()\nexcept SystemExit: pass"
    )
    code += "\nassert not {'torch', 'transformers', 'sana.pipelines'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--interval_guidance" in done.stdout


def test_all_flags_reach_the_options(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(batch, "run", lambda options: seen.append(options) or [])
    flags = (
        "--config=c.yaml --model_path=m.pth --json_file=p.json --work_dir=w --version=sigma --sample_nums=9 --bs=2 "
        "--cfg_scale=5 --pag_scale=2 --sampling_algo=flow_euler --seed=3 --dataset=d --step=7 --add_label=l "
        "--tar_and_del=true --exist_time_prefix=t --custom_image_size=96 --start_index=1 --end_index=8 "
        "--interval_guidance=[0.1,0.9] --ablation_selections=[1,2] --ablation_key=step --debug --if_save_dirname=false "
        "--dtype=bf16 --device=cpu --model.qk_norm=true --use_resolution_binning=false --upscale_from=512 "
        "--upscale_strength=0.4 --step_cache=0.2 --max_text_tokens=20 --max_vram=8GB --quantization=int8 "
        "--text_quantization=nf4 --offload=model --vae_tiling=512 --compile=regional"
    )
    assert main(flags.split()) == 0
    (options,) = seen
    assert (options.config, options.model_path, options.json_file, options.work_dir) == (
        "c.yaml",
        "m.pth",
        "p.json",
        "w",
    )
    assert (options.sample_nums, options.bs, options.cfg_scale, options.pag_scale, options.seed) == (9, 2, 5.0, 2.0, 3)
    assert (options.sampling_algo, options.step, options.custom_image_size) == ("flow_euler", 7, 96)
    assert (options.dataset, options.add_label, options.exist_time_prefix) == ("d", "l", "t")
    assert (options.tar_and_del, options.debug, options.if_save_dirname) == (True, True, False)
    assert (options.start_index, options.end_index, options.interval_guidance) == (1, 8, [0.1, 0.9])
    assert (options.ablation_key, options.ablation_selections) == ("step", [1.0, 2.0])
    assert (options.dtype, options.device, list(options.overrides)) == ("bf16", "cpu", ["--model.qk_norm=true"])
    assert (options.use_resolution_binning, options.upscale_from, options.upscale_strength) == (False, 512, 0.4)
    assert (options.step_cache, options.max_text_tokens, options.compile) == (0.2, 20, "regional")
    assert (options.quantization, options.text_quantization) == ("int8", "nf4")
    assert (options.max_vram, options.offload, options.vae_tiling) == ("8GB", "model", 512)


def test_every_flag_has_a_line_of_help_that_fits():
    actions = [action for action in build_parser()._actions if action.dest != "help"]
    assert all(action.help and len(action.help) <= 96 for action in actions)
    known = {option for action in actions for option in action.option_strings}
    options = {one.name for one in dataclasses.fields(InferenceOptions)} - {"overrides"}
    assert known == {f"--{name}" for name in options | {"version"}}


@pytest.mark.parametrize(("text", "value"), [("512", 512), ("true", True), ("no", False)])
def test_tiles_are_a_side_or_a_yes_or_no(text, value):
    (given,) = vars(build_parser().parse_args([f"--vae_tiling={text}"])).values()
    assert given == tiles(text) == value and type(given) is type(value)
    assert build_parser().parse_args(["--vae_tiling"]).vae_tiling is True


@pytest.mark.parametrize("text", ["[0,1]", "0, 1", "(0 1)"])
def test_numbers_are_read_as_lists(text):
    assert numbers(text) == [0.0, 1.0]


def test_pictures_and_index_are_made_and_found_again(arguments, tmp_path, capsys):
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "index.png")
    pictures = sorted(path for path in (tmp_path / "out").glob("*.png") if path.name != "index.png")
    assert [read_recipe(path)["prompt"] for path in pictures] == ["a cat", "a dog"]
    before = [path.stat().st_mtime_ns for path in pictures]
    assert main(arguments) == 0
    assert [path.stat().st_mtime_ns for path in pictures] == before


def test_config_and_weights_apart_with_an_override(arguments, model_folder, tmp_path):
    import yaml

    from sana.config import config_to_dict
    from sana.pipelines import loading

    config = config_to_dict(loading.source_config(loading.find_model(model_folder)))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    torch.save({"state_dict": load_state_dict(model_folder)}, tmp_path / "w.pth")
    given = [*arguments[1:], f"--config={tmp_path / 'c.yaml'}", f"--model_path={tmp_path / 'w.pth'}"]
    assert main([*given, "--scheduler.flow_shift=1.5"]) == 0
    assert {read_recipe(path).get("flow_shift") for path in (tmp_path / "out").glob("a*.png")} == {1.5}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--custom_image_size=0"], "height must be"),
        (["--custom_image_size=-1"], "height must be"),
        (["--custom_image_size=1000000000"], "height must be"),
        (["--cfg_scale=nan"], "guidance_scale must be a finite number"),
        (["--sampling_algo=flow_dpm"], "Did you mean 'flow_dpm-solver'"),
        (["--txt_file=/nowhere.txt"], "/nowhere.txt does not exist"),
        (["--bs=0"], "bs must be"),
        (["--dtype=int3"], "Unknown dtype"),
        (["--model.depth=2"], "needs --config"),
        (["--quantization=int9"], "Did you mean 'int8'"),
        (["--quantization=int4"], "does not run on cpu"),
        (["--offload=modell"], "Did you mean 'model'"),
        (["--offload=model"], "has no effect with device cpu"),
        (["--compile=max"], "captures CUDA graphs"),
        (["--vae_tiling=7"], "vae_tiling must be"),
        (["--max_vram=8"], "has no unit"),
        (["--upscale_strength=0.5"], "without upscale_from"),
        (["--upscale_from=64"], "makes no picture smaller"),
        (["--custom_image_size=96", "--upscale_from=64", "--sampling_algo=flow_dpm"], "Did you mean"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(arguments, tmp_path, capsys, flags, message):
    code, line = run_failing([*arguments, *flags], capsys)
    assert code == 2 and message in line
    assert not (tmp_path / "out").exists()


def test_a_list_that_does_not_fit_is_refused_before_weights_are_loaded(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loading, "load_transformer", lambda *given: pytest.fail("weights were loaded"))
    code, line = run_failing([*arguments, "--max_vram=1kB"], capsys)
    assert code == command.DOES_NOT_FIT and "0.0" in line
    assert not (tmp_path / "out").exists()


def test_a_scheme_whose_package_is_missing_names_the_extra(arguments, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    missing = lambda name, package=None: None if name == "bitsandbytes" else find(name, package)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    code, line = run_failing([*arguments, "--quantization=nf4"], capsys)
    assert code == 2 and "bitsandbytes" in line and "pip install" in line
    assert not (tmp_path / "out").exists()


def test_a_list_that_fits_says_so_in_one_line(arguments, tmp_path, capsys):
    assert main([*arguments, "--max_vram=1GB", "--custom_image_size=96", "--upscale_from=64", "--step=2"]) == 0
    (line,) = [one for one in capsys.readouterr().err.splitlines() if "at most" in one]
    assert "96 x 96 px" in line and "of 1.00GB" in line
    assert len(list((tmp_path / "out").glob("a *.png"))) == 2


def test_malformed_json_names_line_and_column(arguments, tmp_path, capsys):
    (tmp_path / "p.json").write_text('{"a": {"prompt": "x"},\n  oops}')
    given = [arguments[0], *arguments[2:], f"--json_file={tmp_path / 'p.json'}"]
    code, line = run_failing(given, capsys)
    assert code == 2 and "line 2, column 3" in line


@pytest.mark.parametrize("argument", ["--no_such_flag=1", "positional", "--seed=x", "--debug=perhaps"])
def test_argparse_rejects_what_it_does_not_know(argument):
    with pytest.raises(SystemExit) as caught:
        main([argument])
    assert caught.value.code == 2


def test_a_config_without_weights_asks_for_them(tmp_path, arguments, capsys):
    (tmp_path / "c.yaml").write_text("model:\n  image_size: 64\n")
    code, line = run_failing([*arguments[1:], f"--config={tmp_path / 'c.yaml'}"], capsys)
    assert code == 2 and "--model_path" in line


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


def test_broken_and_hostile_weights_fail_with_exit_code_1(arguments, model_folder, tmp_path, capsys):
    torch.save({"state_dict": load_state_dict(model_folder)}, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "truncated.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "hostile.pth").write_bytes(pickle.dumps({"state_dict": Hostile(tmp_path / "owned")}))
    (tmp_path / "empty").mkdir()
    for name in ("truncated.pth", "hostile.pth", "empty", "missing"):
        code, line = run_failing([*arguments, f"--model_path={tmp_path / name}"], capsys)
        assert code == 1 and name in line
    assert not (tmp_path / "owned").exists() and not (tmp_path / "out").exists()


def test_what_cannot_be_fetched_is_named(arguments, capsys):
    code, line = run_failing([*arguments, "--model_path=hf://nobody/nothing/weights.pth"], capsys)
    assert code == 1 and "nobody/nothing" in line


def test_a_flag_without_effect_is_logged(arguments, capsys):
    assert main([*arguments[:-1], "--gpu_id=0", "--version=sigma"]) == 0
    shown = capsys.readouterr().err
    assert "--version has no effect" in shown
    assert torch.cuda.is_available() or "gpu_id 0 has no effect" in shown


def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys, arguments):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(batch, "run", interrupt)
    assert main(arguments) == command.INTERRUPTED
    assert "run the same command again" in capsys.readouterr().err


def test_an_unforeseen_error_keeps_its_traceback(monkeypatch, arguments):
    def crash(options):
        raise KeyError("a bug")

    monkeypatch.setattr(batch, "run", crash)
    with pytest.raises(KeyError):
        main(arguments)


def test_the_command_and_its_replay_as_a_user_runs_them(arguments, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = [sys.executable, str(ROOT / "scripts/inference.py"), *arguments, "--end_index=1"]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    picture = next((tmp_path / "out").glob("a cat*.png"))
    again = [sys.executable, str(ROOT / "scripts/replay.py"), str(picture), "--device=cpu"]
    done = subprocess.run(again, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the same picture, every pixel" in done.stdout


def test_json_recipes_hold_the_whole_prompt(arguments, tmp_path):
    prompt = "雪山 🌸 " + "long " * 100
    (tmp_path / "p.json").write_text(json.dumps({"a": {"prompt": prompt}}, ensure_ascii=False), encoding="utf-8")
    assert main([arguments[0], *arguments[2:], f"--json_file={tmp_path / 'p.json'}"]) == 0
    picture = next(path for path in (tmp_path / "out").glob("*.png") if path.name != "index.png")
    assert read_recipe(picture)["prompt"] == prompt
