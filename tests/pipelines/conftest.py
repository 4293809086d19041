"""One tiny model folder and one loaded pipeline for all tests of this folder."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sana.ops import packing
from sana.pipelines.sana_pipeline import SanaPipeline
from tests.tiny_model import make_model_folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def pipeline(model_folder: Path) -> SanaPipeline:
    return SanaPipeline.from_pretrained(model_folder, device="cpu")


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No packed copies of weights: whether there is one decides the last bits, and they are not what is counted."""
    monkeypatch.setattr(packing, "pack_budget", lambda: 0)


@pytest.fixture
def open_pipeline(model_folder) -> Callable[[], SanaPipeline]:
    return lambda: SanaPipeline.from_pretrained(model_folder, device="cpu")


@pytest.fixture(scope="module")
def plain(model_folder) -> SanaPipeline:
    return SanaPipeline.from_pretrained(model_folder, device="cpu")
