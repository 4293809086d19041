"""The bundled model, and a model of some kilobytes, for all tests of this folder."""

from pathlib import Path

import pytest

from sana.pipelines.sana_pipeline import SanaPipeline
from tests.tiny_model import make_model_folder

BUNDLED = Path(__file__).parents[2] / "asset/models/sana_tiny"


@pytest.fixture(scope="session")
def bundled() -> SanaPipeline:
    return SanaPipeline.from_pretrained(BUNDLED, device="cpu")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> SanaPipeline:
    """Pictures of 64 x 64 pixels, of random weights."""
    return SanaPipeline.from_pretrained(make_model_folder(tmp_path_factory.mktemp("models") / "small"), device="cpu")
