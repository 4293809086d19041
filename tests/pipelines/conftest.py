"""One tiny model folder and one loaded pipeline for all tests of this folder."""

from pathlib import Path

import pytest

from sana.pipelines.sana_pipeline import SanaPipeline
from tests.tiny_model import make_model_folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def pipeline(model_folder: Path) -> SanaPipeline:
    return SanaPipeline.from_pretrained(model_folder, device="cpu")
