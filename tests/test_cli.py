"""The command `sana`: every command is found, helps and ends as documented; nothing heavy is imported for it."""

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sana import cli

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "tokenizers", "numpy", "PIL", "yaml", "gradio", "fastapi")
DOCUMENT = ROOT / "asset/docs/cli.md"


def sana(*arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, "-m", "sana.cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_help_and_mistakes_import_nothing_heavy():
    """All in one process, since none of them may leave anything behind."""
    code = (
        "import sys\n"
        "from sana import cli\n"
        f"calls = [[*name.split(), '--help'] for name in {list(cli.COMMANDS)}]\n"
        "calls += [['--help'], ['--version'], [], ['nothing'], ['data'], ['convert', '--help'], ['convert', 'x']]\n"
        "calls += [['completion', 'zsh'], ['generate', '--nothing=1']]\n"
        "for call in calls:\n"
        "    try:\n"
        "        cli.main(call)\n"
        "    except SystemExit:\n"
        "        continue\n"
        f"sys.exit(', '.join(name for name in {HEAVY} if name in sys.modules) or 0)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-300:]


def test_every_command_is_in_the_help_with_its_example(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr()
    for name, command in cli.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.help)}$", shown.out, re.MULTILINE)
        assert f"  {command.example}\n" in shown.out
    assert "130" in shown.out and shown.err == ""


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_commands_help_has_examples_and_exit_codes(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*name.split(), "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    assert f"sana {name}" in shown.partition("\n")[0]
    assert len(re.findall(rf"^ *(?:eval \"\$\(|torchrun .*)?sana {name}\b", shown, re.MULTILINE)) >= 1
    assert "Exit code" in shown


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_examples_parse(name):
    """Those of `sana --help`, and those of the command's own help that are whole."""
    parser = cli.parser_of(name)
    lines = [line.strip().split("   ")[0] for line in parser.description.splitlines()]
    examples = [cli.COMMANDS[name].example, *(line for line in lines if line.startswith(f"sana {name}"))]
    for example in examples:
        words = shlex.split(example)[1 + len(name.split()) :]
        words = [word for word in words if word != "...]" and not word.startswith("[--")]
        words = words[: words.index(">")] if ">" in words else words
        _, rest = parser.parse_known_args(words)
        assert all(re.match(r"--\w+\.\w", word) for word in rest), (example, rest)


def test_modules_have_the_two_functions():
    for command in cli.COMMANDS.values():
        module = importlib.import_module(command.module)
        assert isinstance(module.build_parser("prog"), argparse.ArgumentParser) and callable(module.main)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["genrate"], "sana has no command 'genrate'. Did you mean 'generate'?"),
        (["convrt", "to-diffusers"], "Did you mean 'convert'?"),
        (["data", "chek"], "sana data has no command 'chek'. Did you mean 'check'?"),
        (["xyzzy"], "sana has no command 'xyzzy'. See sana --help."),
        (["--jsn"], "sana has no command '--jsn'."),
    ],
)
def test_an_unknown_command_names_the_nearest(words, hint, capsys):
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    assert hint in shown.err and shown.err.count("\n") == 1 and shown.out == ""


def test_nothing_at_all_is_wrong_usage_and_shows_the_help(capsys):
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().err
    assert cli.main(["convert"]) == 2
    shown = capsys.readouterr().err
    assert "to-diffusers" in shown and "from-diffusers" in shown and "generate" not in shown


def test_help_of_a_group_and_the_version(capsys):
    from sana import __version__

    assert cli.main(["data", "--help"]) == 0
    assert "data check" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_ctrl_c_is_130(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_module", interrupted)
    assert cli.main(["plan"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_command_gets_its_words_and_its_name(monkeypatch):
    seen = []
    module = argparse.Namespace(main=lambda words, prog: seen.append((words, prog)) or 3)
    monkeypatch.setattr(cli, "import_module", lambda name: seen.append(name) or module)
    assert cli.main(["data", "check", "folder", "--json"]) == 3
    assert seen == ["sana.commands.data_check", (["folder", "--json"], "sana data check")]


def test_the_installed_command_is_this_one():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"sana": "sana.cli:main"}


def test_as_a_process_results_and_messages_are_apart():
    done = sana("data", "check", "asset/example_data", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{") and done.stdout.rstrip().endswith("}")
    done = sana("generate", "a cat", "--compile=fast")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr


def test_the_document_has_every_command_and_exit_code():
    text = DOCUMENT.read_text(encoding="utf-8")
    for name in cli.COMMANDS:
        assert f"`sana {name}`" in text, name
    for code in (0, 1, 2, 3, 130, 143):
        assert re.search(rf"^\| {code} \|", text, re.MULTILINE), code


def document_commands() -> list[list[str]]:
    """Returns the words of every `sana` line in the document's shell blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("sana ")]


@pytest.mark.parametrize("words", document_commands(), ids=" ".join)
def test_commands_of_the_document_parse(words):
    words = words[: next((place for place, word in enumerate(words) if word in (">", "|", "2>")), None)]
    if words[0] in ("--help", "--version"):
        return
    name = cli.find(words)
    assert name is not None, words
    _, rest = cli.parser_of(name).parse_known_args(words[len(name.split()) :])
    assert all(re.match(r"--\w+\.\w", word) for word in rest), rest
