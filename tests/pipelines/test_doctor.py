"""The diagnosis: what is missing or broken is found, with the command that mends it; this environment is in order."""

import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sana.pipelines import doctor
from sana.pipelines.doctor import ABSENT, BROKEN, OK, Diagnosis, Finding, Project, diagnose
from tests.tiny_model import make_model_folder

ROOT = Path(__file__).parents[2]


def by_name(findings) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_this_environment_is_in_order():
    diagnosis = diagnose(self_check=False)
    assert diagnosis.healthy, diagnosis.fixes
    assert {finding.part for finding in diagnosis.findings} >= {"python", "packages", "extras", "devices", "kernels"}
    keys = [(finding.part, finding.name) for finding in diagnosis.findings]
    assert len(set(keys)) == len(keys)
    json.dumps(diagnosis.as_dict())


def test_the_project_file_is_what_is_asked_for():
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    project = doctor.read_project()
    assert list(project.packages) == content["dependencies"]
    assert {name: list(lines) for name, lines in project.extras.items()} == content["optional-dependencies"]
    assert set(project.extras) - {doctor.DEVELOPMENT} <= set(doctor.EXTRAS), "say what a new extra is for"


def test_without_the_project_file_what_pip_wrote_down_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    written = importlib.metadata.PathDistribution(tmp_path / "x.dist-info")
    written._path.mkdir()
    (written._path / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: sana-python\nVersion: 1\nRequires-Python: >=3.11\nRequires-Dist: torch>=2\n"
        'Requires-Dist: numpy; python_version > "3"\nRequires-Dist: gradio>=6; extra == "gradio"\n'
        "Provides-Extra: gradio\n"
    )
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: written.metadata)
    assert doctor.read_project() == Project(">=3.11", ("torch>=2", "numpy"), {"gradio": ("gradio>=6",)})


@pytest.fixture
def versions(monkeypatch):
    """Stands in for what is installed."""

    def put(**known):
        def version(name):
            if name not in known:
                raise importlib.metadata.PackageNotFoundError(name)
            return known[name]

        monkeypatch.setattr(importlib.metadata, "version", version)

    return put


def test_packages_that_are_missing_or_out_of_range_are_broken(versions):
    versions(one="1.5", two="3.0", local="2.11.0+cpu")
    lines = ("one>=1,<2", "two<3", "three", "local>=2.11,<2.12")
    found = by_name(doctor.check_packages(Project(">=3.11", lines, {})))
    assert {name: one.state for name, one in found.items()} == {
        "one": OK, "two": BROKEN, "three": BROKEN, "local": OK,
    }  # fmt: skip
    assert found["two"].fix == "pip install 'two<3'" and "3.0 is installed" in found["two"].text
    assert found["three"].fix == "pip install 'three'" and "not installed" in found["three"].text


def test_a_torch_that_cannot_be_imported_is_broken_and_the_rest_is_still_said(versions, monkeypatch):
    versions(torch="2.11.0", torchvision="0.26.0")
    project = Project(">=3.11", ("torch>=2.11", "torchvision>=0.26"), {})
    monkeypatch.setattr(doctor, "read_project", lambda: project)

    def broken(name):
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(importlib, "import_module", broken)
    diagnosis = diagnose()
    assert not diagnosis.healthy
    assert diagnosis.fixes == ("pip install --force-reinstall 'torch>=2.11' 'torchvision>=0.26'",)
    assert {finding.part for finding in diagnosis.findings} == {"python", "packages", "hub", "disk"}


def test_extras(versions):
    versions(gradio="5.0", triton="3.6.0")
    extras = {"gradio": ("gradio>=6",), "triton": ("triton==3.6.0",), "plot": ("matplotlib",), "dev": ("pytest",)}
    found = by_name(doctor.check_extras(Project(">=3.11", (), extras)))
    assert {name: one.state for name, one in found.items()} == {"gradio": ABSENT, "triton": OK, "plot": ABSENT}
    assert found["gradio"].fix == "pip install 'sana-python[gradio]'" and "5.0" in found["gradio"].text
    assert Diagnosis(tuple(found.values())).healthy  # what is optional may be away


def test_an_old_python_is_broken():
    (finding,) = doctor.check_python(Project(">=99.0", (), {}))
    assert finding.state == BROKEN and ">=99.0" in finding.text
    (finding,) = doctor.check_python(Project(">=3.11", (), {}))
    assert finding.state == OK


def test_the_self_check_makes_a_picture(monkeypatch, tmp_path):
    from sana.pipelines import options

    folder = make_model_folder(tmp_path / "tiny")
    monkeypatch.setattr(options, "bundled", lambda name: folder)
    (finding,) = doctor.check_model()
    assert finding.state == OK, finding.text
    assert finding.data["load_s"] > 0 and finding.data["make_s"] > 0
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (finding,) = doctor.check_model()
    assert finding.state == BROKEN and finding.fix == "git checkout -- asset/models/sana_tiny"
    (folder / "model.safetensors").unlink()
    (finding,) = doctor.check_model()
    assert finding.state in (BROKEN, ABSENT) and "is not here" in finding.text


def test_a_token_is_never_shown(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecretverysecretverysecret")
    findings = list(doctor.check_hub())
    assert by_name(findings)["token"].data == {"token": True}
    assert "secret" not in json.dumps(Diagnosis(tuple(findings)).as_dict())


def test_a_check_that_cannot_run_is_a_finding():
    def fails():
        raise ImportError("no module\nnamed x")
        yield

    (finding,) = doctor.guarded("hub", fails)
    assert (finding.state, finding.text) == (BROKEN, "cannot be looked at: no module named x")


def test_without_torch_it_still_speaks(tmp_path):
    """As on a machine where nothing but Python is there: packages are named, nothing crashes."""
    code = (
        "import sys, importlib.metadata as m, json\n"
        "sys.modules.update(dict.fromkeys(('torch', 'torchvision', 'transformers', 'huggingface_hub', 'numpy')))\n"
        "from sana import cli\n"
        "sys.exit(cli.main(['doctor', '--json']))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    content = json.loads(done.stdout)
    assert not content["healthy"]
    states = {(one["part"], one["name"]): one["state"] for one in content["findings"]}
    assert states["packages", "torch"] == BROKEN and states["packages", "pillow"] == OK
    assert content["fixes"][0].startswith("pip install --force-reinstall 'torch")


def test_free_space_of_a_folder_that_is_not_there_yet(tmp_path):
    assert doctor.free_bytes(tmp_path / "a" / "b") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
