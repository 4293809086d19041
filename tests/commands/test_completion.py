"""Shell completion: the scripts are made from the parsers, and bash's is run as bash runs it."""

import argparse
import shutil
import subprocess

import pytest

from sana import cli
from sana.commands import completion

BASH = shutil.which("bash")


@pytest.fixture
def script(capsys):
    def make(shell: str) -> str:
        assert cli.main(["completion", shell]) == 0
        return capsys.readouterr().out

    return make


@pytest.mark.skipif(BASH is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("sana gen", {"generate"}),
        ("sana d", {"data", "doctor"}),
        ("sana data ", {"check"}),
        ("sana convert t", {"to-diffusers"}),
        ("sana convert to-diffusers --dtype ", {"fp32", "fp16", "bf16"}),
        ("sana convert to-diffusers --dtype=b", {"bf16"}),
        ("sana data check --type SanaW", {"SanaWebDataset", "SanaWebDatasetMS"}),
        ("sana generate --pag", {"--pag_scale"}),
        ("sana completion z", {"zsh"}),
        ("sana plan --config no_such_file", set()),
        ("sana plan --config pro", {"prompts.txt"}),
    ],
)
def test_bash(script, tmp_path, line, expected):
    (tmp_path / "script").write_text(script("bash"))
    (tmp_path / "prompts.txt").touch()
    run = 'source ./script; COMP_LINE="$1"; COMP_POINT=${#1}; _sana; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run([BASH, "-c", run, "-", line], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == "" and set(done.stdout.split()) == expected


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_every_command_and_option_is_offered(script, shell):
    text = script(shell)
    for name in cli.COMMANDS:
        for option in (one for action in cli.parser_of(name)._actions for one in action.option_strings):
            if shell == "fish":
                option = f"-l {option[2:]} " if option.startswith("--") else f"-s {option[1:]} "
            assert option in text, (name, option)
        assert all(word in text for word in name.split())


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_a_shell_that_is_here_reads_its_script(script, tmp_path, shell):
    if (program := shutil.which(shell)) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(script(shell))
    done = subprocess.run([program, "-n", "script"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_quotes_of_help_do_not_end_the_script():
    parser = argparse.ArgumentParser(description="x")
    parser.add_argument("--it", help="the model's `rm -rf` $(own) \\ one")
    follows = completion.table({"do it": parser}, {"do it": "it's"})
    for write in (completion.bash, completion.zsh, completion.fish):
        for line in write(follows).splitlines():
            if "$(own)" in line:
                before, after = line.split("$(own)")
                assert before.count("'") % 2 == 1 and after.count("'") % 2 == 1


def test_an_unknown_shell_is_wrong_usage(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["completion", "tcsh"])
    assert "tcsh" in capsys.readouterr().err
