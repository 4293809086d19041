"""The image, built and run: by Docker where it answers, else line by line in a sandbox."""

import json
import re
import socket
from collections.abc import Iterator

import pytest

from tests.docker import sandbox
from tests.docker.engine import ROOT, DockerEngine, SandboxEngine, read, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerEngine | SandboxEngine]:
    """The built image."""
    engine = DockerEngine if DockerEngine.answers() else SandboxEngine
    if engine is SandboxEngine and (missing := sandbox.missing()):
        pytest.skip(missing)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    built = engine(tmp_path_factory.mktemp("image"), port)
    try:
        built.build()
        yield built
    finally:
        built.close()


def output(image: DockerEngine | SandboxEngine, *words: str, user: str = "") -> str:
    done = image.run(*words, user=user)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_package_has_the_version_of_the_lock(image: DockerEngine | SandboxEngine) -> None:
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    lines = re.findall(r"^([\w.-]+)(?:\[[^\]]*\])?==([^;\s]+)", lock, re.MULTILINE)
    locked = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in lines}
    found = json.loads(output(image, "pip", "list", "--format=json"))
    listed = {re.sub(r"[-_.]+", "-", one["name"]).lower(): one["version"] for one in found}
    own = {name: listed.pop(name) for name in ("pip", "sana-python")}
    assert own["sana-python"]
    assert {name: version for name, version in listed.items() if locked.get(name) != version} == {}
    assert {"torch", "gradio", "fastapi", "triton"} <= set(listed)
    assert not {"pytest", "ruff", "mkdocs"} & set(listed)
    output(image, "pip", "check")


def test_a_command_after_the_name_of_the_image_is_run(image: DockerEngine | SandboxEngine) -> None:
    words = ("sana", "generate", "a red circle", "-o", "output/circle.png", "--step=2", "--json")
    pictures = json.loads(output(image, *words))["pictures"]
    assert [picture["recipe"]["prompt"] for picture in pictures] == ["a red circle"]
    assert image.run("sana", "generate", "--no_such_option").returncode == 2


@pytest.mark.parametrize("user", ["", "4321:4321"])
def test_nobody_is_root_and_everybody_can_work(image: DockerEngine | SandboxEngine, user: str) -> None:
    code = (
        "import getpass, os, pathlib, tempfile, torch\n"
        "assert getpass.getuser() == 'sana' and os.path.expanduser('~') == '/root'\n"
        "for folder in ('output', '/root', '/root/.cache', '/tmp'): tempfile.TemporaryFile(dir=folder).close()\n"
        "print(os.getuid(), [path for path in ('sana/cli.py', 'sana', '/opt/venv/bin') if os.access(path, os.W_OK)])\n"
    )
    assert output(image, "python", "-c", code, user=user) == f"{user.partition(':')[0] or 1000} []"


def test_triton_finds_a_compiler_and_the_headers_of_python(image: DockerEngine | SandboxEngine) -> None:
    code = (
        "import subprocess, sysconfig, tempfile\n"
        "line = ['gcc', '-x', 'c', '-shared', '-fPIC', '-I', sysconfig.get_path('include'), '-', '-o']\n"
        "with tempfile.NamedTemporaryFile() as file:\n"
        "    subprocess.run([*line, file.name], input=b'#include <Python.h>', check=True)\n"
        "import triton; print(triton.__version__)\n"
    )
    assert output(image, "python", "-c", code)


def test_the_default_command_serves_a_page_until_it_is_stopped(image: DockerEngine | SandboxEngine) -> None:
    image.start()
    wait_for(image.is_healthy, image.is_alive, image.log)
    assert "gradio_config" in read(f"http://127.0.0.1:{image.port}/")
    code, log = image.stop(), image.log()
    assert code in (0, 143), log
    assert "at http://" in log
    assert "Traceback" not in log
    assert not image.is_alive()


def test_nothing_is_in_the_image_that_does_not_belong(image: DockerEngine | SandboxEngine) -> None:
    listed = output(image, "sh", "-c", "ls -A; ls -A asset").split()
    assert not {"tests", ".git", "comfyui", "docs", ".ci"} & set(listed)
    assert {"sana", "app", "configs", "LICENSE", "models"} <= set(listed)
