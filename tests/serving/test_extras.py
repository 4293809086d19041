"""Without the extra, everything imports, and the error names it."""

import subprocess
import sys
from pathlib import Path

import pytest

from sana.serving import extras

ROOT = Path(__file__).parents[2]


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ValueError, match=r"needs uvicorn: pip install 'sana-python\[serve\]'"):
        extras.need_all()
    with pytest.raises(ValueError, match="needs nowhere"):
        extras.need("nowhere.at_all")


def test_ray_has_an_extra_of_its_own(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    with pytest.raises(ValueError, match=r"needs ray: pip install 'sana-python\[ray\]'"):
        extras.need_ray()


def test_importing_the_server_imports_no_extra():
    names = ["sana.serving." + path.stem for path in (ROOT / "sana/serving").glob("*.py") if path.stem != "__init__"]
    code = f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
    code += (
        f"found = {{'starlette', 'ray', *{extras.PACKAGES!r}}} & set(sys.modules)\nsys.exit(str(found) if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
