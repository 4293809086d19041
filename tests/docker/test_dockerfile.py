"""Dockerfile and .dockerignore as they stand: what is copied, who runs, which versions; and their parser."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.docker.dockerfile import DockerfileError, Instruction, context_files, pairs, parse, substitute

ROOT = Path(__file__).parents[2]
INSTRUCTIONS = parse((ROOT / "Dockerfile").read_text(encoding="utf-8"))
IGNORE = (ROOT / ".dockerignore").read_text(encoding="utf-8")


def those(name: str) -> list[Instruction]:
    return [one for one in INSTRUCTIONS if one.name == name]


def variables() -> dict[str, str]:
    known: dict[str, str] = {}
    for one in those("ENV"):
        known |= pairs(one, known)
    return known


@pytest.fixture(scope="module")
def sent() -> list[str]:
    """The files that a build of this folder is given."""
    return context_files(ROOT, IGNORE)


def test_every_copied_path_is_in_the_build(sent: list[str]) -> None:
    copied = [source for one in those("COPY") if not one.flag("from") for source in one.value.split()[:-1]]
    assert copied
    for source in copied:
        assert source == "." or source in sent or any(path.startswith(f"{source}/") for path in sent), source


def test_what_the_lines_name_is_in_the_build(sent: list[str]) -> None:
    lines = "\n".join(one.value for one in INSTRUCTIONS if one.name in ("RUN", "CMD", "ENTRYPOINT", "HEALTHCHECK"))
    named = re.findall(r"/opt/sana/([\w./-]+)", lines)
    assert len(named) == 2
    assert [path for path in named if path not in sent] == []
    compiled = re.search(r"compileall -q ([\w ]+)", lines)
    assert compiled is not None
    for folder in compiled[1].split():
        assert any(path.startswith(f"{folder}/") for path in sent), folder


def test_everything_that_the_program_reads_is_sent_and_nothing_else(sent: list[str]) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode != 0:
        pytest.skip("needs a checkout of git: what is tracked decides what belongs into the image")
    wanted = ("sana/", "app/", "configs/", "scripts/", "asset/models/", "asset/app_styles/", "docker/")
    assert [path for path in tracked.stdout.split() if path.startswith(wanted) and path not in sent] == []
    assert {"LICENSE", "README.md", "pyproject.toml", "requirements.lock"} <= set(sent)
    strangers = ("tests/", ".git", "output/", "asset/docs/", "comfyui/", ".ci/", ".venv/")
    assert [path for path in sent if path.startswith(strangers) or "__pycache__" in path or "/." in path] == []


def test_the_base_image_is_pinned_and_is_of_the_cuda_that_torch_was_built_for() -> None:
    bases = [one.value.split()[0] for one in those("FROM")]
    assert bases
    for base in bases:
        image, _, tag = base.partition(":")
        assert image == "nvidia/cuda"
        assert re.fullmatch(r"\d+\.\d+\.\d+-base-ubuntu\d\d\.04", tag), "a tag that moves, or one with CUDA's libraries"
        lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
        toolkit = re.search(r"^cuda-toolkit\[.*\]==(\d+\.\d+)", lock, re.MULTILINE)
        assert toolkit is not None and tag.startswith(toolkit[1])


def test_nobody_is_root_at_the_end() -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", those("USER")[-1].value)
    after = INSTRUCTIONS[INSTRUCTIONS.index(those("USER")[-1]) :]
    assert not [one for one in after if one.name in ("RUN", "COPY")]


def test_packages_lie_below_the_code() -> None:
    packages = next(one for one in those("RUN") if "requirements.txt" in one.value)
    everything = next(one for one in those("COPY") if one.value.startswith(". "))
    assert INSTRUCTIONS.index(packages) < INSTRUCTIONS.index(everything)


@pytest.mark.parametrize("line", those("RUN"), ids=lambda line: f"line {line.line}")
def test_run_lines_are_shell_and_leave_nothing_behind(line: Instruction) -> None:
    done = subprocess.run(["sh", "-n", "-c", line.value], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if "pip install" in line.value:
        assert "--no-cache-dir" in line.value or any("type=cache" in mount for mount in line.flag("mount"))
    if "apt-get" in line.value:
        assert "--no-install-recommends" in line.value
        assert "rm -rf /var/lib/apt/lists/*" in line.value
        assert "apt-get update" in line.value


def test_what_is_run_is_given_word_by_word() -> None:
    check = those("HEALTHCHECK")[-1]
    assert {name for name, _ in check.flags} == {"interval", "timeout", "start-period", "retries"}
    healthcheck = Instruction("CMD", check.value.removeprefix("CMD").strip())
    for one in (*those("CMD"), *those("ENTRYPOINT"), healthcheck):
        assert one.words(), f"{one.name} goes through a shell, which does not hand signals on"
    assert len(those("CMD")) == len(those("ENTRYPOINT")) == 1


def test_the_default_command_is_understood() -> None:
    from app.app_sana import build_parser

    (command,) = those("CMD")
    program, name, *arguments = command.words() or []
    assert (program, name) == ("sana", "app")
    assert vars(build_parser().parse_args(arguments))["host"] == "0.0.0.0"
    assert [variables()["DEMO_PORT"]] == [one.value for one in those("EXPOSE")]


def test_labels() -> None:
    labels: dict[str, str] = {}
    for one in those("LABEL"):
        labels |= pairs(one, {})
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert labels["org.opencontainers.image.version"] == project["version"]
    assert labels["org.opencontainers.image.licenses"] == project["license"]


def test_no_secrets() -> None:
    secret = re.compile(r"(token|password|secret|api_?key)\w*\s*=", re.IGNORECASE)
    assert [one for one in INSTRUCTIONS if secret.search(one.value)] == []


def test_parsing() -> None:
    text = '# a comment\nFROM a:1 AS b\nENV x=1 \\\n  # between\n\n  y="two words"\n'
    text += "RUN <<EOF\nset -e\nEOF\nCOPY --from=b --chown=1:1 c d/\n"
    base, environment, run, copy = parse(text)
    assert (base.value, base.line, run.heredocs, run.line) == ("a:1 AS b", 2, {"EOF": "set -e\n"}, 7)
    assert pairs(environment, {}) == {"x": "1", "y": "two words"}
    assert (copy.flag("from"), copy.flag("chown"), copy.value) == (["b"], ["1:1"], "c d/")
    assert Instruction("CMD", '["a", "b c"]').words() == ["a", "b c"]
    assert Instruction("CMD", "a 'b c'").words() is None
    assert Instruction("CMD", "['a']").words() is None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("FROM a\nFLY b", "unknown instruction FLY"),
        ("FROM a\nRUN b \\", "goes on"),
        ("FROM a\nRUN <<EOF\nb", "not closed"),
        ("FROM a\nRUN", "says nothing"),
        ("RUN a", "begins with FROM"),
    ],
)
def test_what_docker_would_refuse(text: str, complaint: str) -> None:
    with pytest.raises(DockerfileError, match=complaint):
        parse(text)


def test_variables() -> None:
    known = {"a": "1", "empty": ""}
    assert substitute(r"$a ${a} \$a ${empty:-x} ${a:+y} ${empty:+y}$gone", known) == "1 1 $a x y "


def test_ignore_rules(tmp_path: Path) -> None:
    names = ("a.py", "b/c.py", "b/d/e.py", "b/d/__pycache__/e.pyc", "f/g.txt", "f/h.txt", "i/.j", "k.md")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    kept = context_files(tmp_path, "*\n!b\n!f/?.txt\n# no rule\nf/h.*\n!i/\n**/__pycache__\n**/.*\n")
    assert kept == ["b/c.py", "b/d/e.py", "f/g.txt"]
    assert context_files(tmp_path, "*.py\nb/**/*.py\n") == sorted({*names} - {"a.py", "b/c.py", "b/d/e.py"})
