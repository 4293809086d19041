"""Every command and every link of README.md: it runs, or, where it needs weights from the network, it parses."""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from sana.config import load_config

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
NOT_OURS = (
    "git",
    "cd",
    "conda",
    "source",
    "docker",
    "hf",
    "huggingface-cli",
    "pip",
    "export",
    "mkdir",
    "cp",
    "apt-get",
    "sudo",
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
REMOTE = re.compile(r"hf://|https?://|Efficient-Large-Model/|mit-han-lab/|google/")


def blocks(language: str) -> list[str]:
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    return [body for kind, body in BLOCK.findall(text) if kind == language]


def commands() -> list[str]:
    """Returns every shell command, continued lines joined, comments and prompts removed, `a && b` split."""
    found = []
    for body in [*blocks("bash"), *blocks("sh"), *blocks("console")]:
        for line in body.replace("\\\n", " ").splitlines():
            words = shlex.split(line.strip().removeprefix("$ "), comments=True)
            command: list[str] = []
            for word in [*words, "&&"]:
                if word in ("&&", ";", "|"):
                    if command:
                        found.append(shlex.join(command))
                    command = []
                else:
                    command.append(word)
    return list(dict.fromkeys(found))


def run(arguments: list[str], cwd: Path, seconds: int = 300) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        arguments, cwd=cwd, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )


@cache
def help_of(script: str) -> str:
    done = run([sys.executable, script, "--help"], ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def checkout(folder: Path) -> Path:
    """Returns a folder in which the repository's relative paths exist and output/ is empty."""
    for name in ("asset", "configs", "scripts", "tools", "train_scripts", "app", "tests"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "output").mkdir()
    return folder


def parse_python(script: str, arguments: list[str], folder: Path) -> None:
    """Checks that a Python command is understood; inference with local weights is really run, on one prompt."""
    assert (ROOT / script).is_file(), f"{script} does not exist"
    if script == "scripts/inference.py" and not REMOTE.search(" ".join(arguments)):
        extra = ["--sample_nums=1", "--step=2", f"--work_dir={folder / 'pictures'}"]
        done = run([sys.executable, script, *arguments, *extra], checkout(folder))
        assert done.returncode == 0, done.stderr
        assert list((folder / "pictures").rglob("*.png"))
        return
    flags = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    overrides = [argument for argument in arguments if re.match(r"--\w+\.\w", argument)]
    for flag in flags:
        assert "." in flag or re.search(rf"{flag}\b", help_of(script)), f"{script} has no {flag}"
    config = next((a.partition("=")[2] for a in arguments if a.startswith("--config=")), None)
    config = config or next((a for a in arguments if a.endswith(".yaml")), None)
    if config:
        load_config(ROOT / config, overrides)
    for argument in arguments:
        path = argument.partition("=")[2] if argument.startswith("--") else argument
        if path.startswith(("asset/", "configs/", "tests/")):
            assert (ROOT / path).exists(), f"{path} does not exist"


@pytest.mark.parametrize("command", commands())
def test_command(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    while words and re.match(r"^[A-Z_]+=", words[0]):
        words = words[1:]
    program, *arguments = words
    if program in ("accelerate", "torchrun"):
        first = next(index for index, word in enumerate(arguments) if word.endswith(".py"))
        program, arguments = "python", arguments[first:]
    if program == "make":
        done = run(["make", "-n", f"PYTHON={sys.executable}", *arguments], ROOT)
        assert done.returncode == 0, done.stderr
    elif program == "python":
        assert arguments[0] != "-m" or arguments[1] == "pytest", f"not known how to check {command!r}"
        if arguments[0] != "-m":
            parse_python(arguments[0], arguments[1:], tmp_path)
    elif program == "sana":
        quick = ["--help"] if arguments[0] in ("app", "serve") else ["--step=2"] if arguments[0] == "generate" else []
        done = run([sys.executable, "-m", "sana.cli", *arguments, *quick], checkout(tmp_path))
        assert done.returncode == 0, done.stderr
    elif program == "bash":
        script, config, *overrides = arguments
        assert run(["bash", "-n", script], ROOT).returncode == 0
        load_config(ROOT / config, [override for override in overrides if "." in override.partition("=")[0]])
    elif program.startswith("./"):
        assert os.access(ROOT / program, os.X_OK), f"{program} cannot be run"
        assert run(["bash", "-n", program], ROOT).returncode == 0
    else:
        assert program in NOT_OURS, f"not known how to check {command!r}"
        assert program != "docker" or (ROOT / "Dockerfile").exists(), f"{command!r} needs a Dockerfile"


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.strip().splitlines()[0][:40])
def test_python_block(code: str, tmp_path: Path) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
    if REMOTE.search(code) is None:
        done = run([sys.executable, "-c", code], checkout(tmp_path))
        assert done.returncode == 0, done.stderr


def test_there_is_a_readme_with_commands() -> None:
    assert any(command.startswith("make demo") for command in commands())
    assert any(command.startswith("make test") for command in commands())
    assert blocks("python")


def test_links_lead_somewhere() -> None:
    text = README.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    local = {target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:", target)} - {""}
    assert [target for target in local if not (ROOT / target).exists()] == []
