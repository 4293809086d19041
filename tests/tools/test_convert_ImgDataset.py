"""The converter's command line: what it asks, what it answers, and its exit codes."""

# ruff: noqa: N999 - named after its tool

import filecmp
import io
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.data.tars import picture
from tools.convert_ImgDataset_to_WebDatasetMS_format import main

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "asset" / "example_data_tar"


def same(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    same_names = names == sorted(path.name for path in other.iterdir())
    return same_names and filecmp.cmpfiles(one, other, names, shallow=False)[0] == names


def make_folder(folder: Path, count: int = 3) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.png").write_bytes(picture())
        (folder / f"{number}.txt").write_text("a caption")
    return folder


def test_the_shipped_shards_are_what_the_converter_makes_of_the_shipped_folder(tmp_path, capsys):
    assert main(["--input", str(ROOT / "asset" / "example_data"), "--output", str(tmp_path / "out")]) == 0
    assert same(tmp_path / "out", EXAMPLE)
    assert "12 images in 1 shards" in capsys.readouterr().out


def test_without_arguments_and_terminal_it_asks_nothing_and_finds_its_work_done(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys, "argv", ["convert"])
    assert main() == 0
    assert f"{EXAMPLE}: 12 images in 1 shards, 1 of them there already" in capsys.readouterr().out


class Terminal(io.StringIO):
    """Standard input of a person."""

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_it_asks_with_defaults(tmp_path, monkeypatch, capsys):
    source = make_folder(tmp_path / "in")
    monkeypatch.setattr(sys, "stdin", Terminal(f"{source}\n\n"))
    assert main([]) == 0
    asked = capsys.readouterr().out
    assert f"[{ROOT / 'asset/example_data'}]" in asked and f"[{tmp_path / 'in_tar'}]" in asked
    assert (tmp_path / "in_tar" / "wids-meta.json").is_file()


def test_with_arguments_it_asks_nothing_on_a_terminal_either(tmp_path, monkeypatch):
    source = make_folder(tmp_path / "in")
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    assert main(["--input", str(source)]) == 0
    assert (tmp_path / "in_tar" / "wids-meta.json").is_file()


def test_a_run_that_was_killed_is_taken_up(tmp_path):
    source = make_folder(tmp_path / "in", 40)
    arguments = ["--input", str(source), "--shard_size", "1", "--output"]
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    child = os.fork()  # a fresh interpreter would take seconds to start
    if child == 0:
        os._exit(main([*arguments, str(tmp_path / "out")]))
    ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while not (tmp_path / "out" / "00000003.tar").exists() and os.waitid(os.P_PID, child, ended) is None:
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert all(path.suffix in (".tar", ".part", ".json") for path in (tmp_path / "out").iterdir())
    assert main([*arguments, str(tmp_path / "out")]) == 0
    assert same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "{tmp}/none"], "There is no folder"),
        (["--input", "{tmp}/empty"], "No captioned image"),
        (["--input", "{tmp}/bad"], "0.png cannot be packed"),
        (["--input", "{tmp}/good", "--output", "{tmp}/file/x"], "Not a directory"),
    ],
)
def test_bad_data_is_one_sentence_and_exit_code_1(tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    (make_folder(tmp_path / "bad", 1) / "0.png").write_bytes(b"no picture")
    make_folder(tmp_path / "good", 1)
    (tmp_path / "file").write_text("")
    assert main([argument.format(tmp=tmp_path) for argument in arguments]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("convert_ImgDataset_to_WebDatasetMS_format: ") and message in last


@pytest.mark.parametrize(
    "arguments",
    [["--shard_size", "0"], ["--max_bytes", "-1"], ["--shard_size", "x"], ["--unknown"], ["--caption_lines", "2"]],
)
def test_wrong_arguments_are_exit_code_2(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


def test_broken_images_can_be_left_out(tmp_path, capsys):
    folder = make_folder(tmp_path / "in", 3)
    (folder / "1.png").write_bytes(b"no picture")
    assert main(["--input", str(folder), "--output", str(tmp_path / "out"), "--skip_broken"]) == 0
    shown = capsys.readouterr()
    assert "left out 1.png" in shown.err
    assert "2 images in 1 shards" in shown.out
