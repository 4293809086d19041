"""sana generate: prompts on the command line, the paths and recipes that it prints, options that contradict."""

import json
from pathlib import Path

import pytest
from PIL import Image

from sana.commands.generate import build_parser, main
from sana.commands.inference import build_parser as script_parser
from sana.pipelines import batch
from sana.pipelines.images import read_recipe
from tests.tiny_model import make_model_folder


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = make_model_folder(tmp_path_factory.mktemp("models") / "tiny")
    return [f"--model_path={folder}", "--step=1", "--device=cpu"]


def test_every_option_of_the_script_is_here():
    names = {text for action in script_parser()._actions for text in action.option_strings}
    assert names <= {text for action in build_parser()._actions for text in action.option_strings}


def test_a_prompt_becomes_the_named_file(options, tmp_path, capsys):
    target = tmp_path / "new" / "cat.png"
    assert main(["a cat", "-o", str(target), "--height=64", "--width=96", "--seed=5", *options]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{target}\n" and "INFO" in shown.err
    with Image.open(target) as image:
        assert image.size == (96, 64)
    assert [path.name for path in target.parent.iterdir()] == ["cat.png"]
    assert (read_recipe(target)["prompt"], read_recipe(target)["seed"]) == ("a cat", 5)


def test_the_script_makes_the_same_picture(options, tmp_path, capsys):
    from sana.commands import inference

    (tmp_path / "prompts.txt").write_text("a cat --hw 64:96\n")
    assert (
        inference.main([f"--txt_file={tmp_path / 'prompts.txt'}", f"--work_dir={tmp_path / 'theirs'}", *options]) == 0
    )
    assert main(["a cat --hw 64:96", "-o", str(tmp_path / "ours.png"), *options]) == 0
    (theirs,) = (tmp_path / "theirs").glob("a cat*.png")
    assert (tmp_path / "ours.png").read_bytes() == theirs.read_bytes()


def test_json_has_every_picture_with_its_recipe(options, tmp_path, capsys):
    words = ["--json", "a cat", "a dog", "-n", "2", "--negative_prompt=grey", "-o", str(tmp_path / "out"), *options]
    assert main(words) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["folders"] == [str(tmp_path / "out")] and first["indexes"] == [str(tmp_path / "out" / "index.png")]
    seeds = [(one["recipe"]["prompt"], one["recipe"]["seed"], one["made"]) for one in first["pictures"]]
    assert seeds == [("a cat", 0, True), ("a cat", 1, True), ("a dog", 2, True), ("a dog", 3, True)]
    assert {one["recipe"]["negative_prompt"] for one in first["pictures"]} == {"grey"}
    assert all(Path(one["path"]).is_file() for one in first["pictures"])
    assert main(words) == 0
    again = json.loads(capsys.readouterr().out)
    assert [one["made"] for one in again["pictures"]] == [False] * 4
    assert [one["path"] for one in again["pictures"]] == [one["path"] for one in first["pictures"]]


def test_packed_pictures_are_one_path(options, tmp_path, capsys):
    assert main(["a cat", f"--work_dir={tmp_path / 'out'}", "--tar_and_del", *options]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out.tar'}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--height=64"], "--height belongs to prompts on the command line"),
        (["a", "--txt_file=x.txt"], "prompts on the command line and --txt_file were both given"),
        (["a", "-o", "x", "--work_dir=y"], "--output and --work_dir were both given"),
        (["a", "b", "-o", "x.png"], "--output x.png is one picture"),
        (["a", "-n2", "-o", "x.PNG"], "--output x.PNG is one picture"),
        (["--txt_file=t.txt", "-o", "x.png"], "--output x.png is one picture"),
        (["a", "-o", "x.png", "--tar_and_del"], "--tar_and_del is about a folder"),
        (["a", "-n", "0"], "--number must be at least 1"),
        (["a", "--sede=1"], "unknown argument --sede=1"),
    ],
)
def test_contradictions_are_wrong_usage(words, message, capsys, monkeypatch):
    monkeypatch.setattr(batch, "run", lambda options: pytest.fail("something was made"))
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert message in capsys.readouterr().err


def test_a_wrong_suffix_does_not_name_a_file_of_ours(options, capsys):
    assert main(["a --hw 3", *options]) == 2
    error = capsys.readouterr().err
    assert "the command line, entry '1': --hw needs height:width" in error and "prompts.json" not in error


def test_config_overrides_reach_the_options(monkeypatch):
    seen = []
    monkeypatch.setattr(batch, "run", lambda options: seen.append(options) or [])
    assert main(["--config=c.yaml", "--model.qk_norm=true", "--sample_nums=2"]) == 0
    assert (seen[0].config, list(seen[0].overrides), seen[0].sample_nums) == ("c.yaml", ["--model.qk_norm=true"], 2)
