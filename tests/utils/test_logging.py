"""Who prints what."""

import logging
from pathlib import Path

import pytest

from sana.utils.logging import get_logger, setup_logging


@pytest.fixture(autouse=True)
def restored():
    logger = logging.getLogger("sana")
    before = logger.handlers[:], logger.propagate, logger.level
    yield
    for handler in logger.handlers:
        handler.close()
    logger.handlers[:], logger.propagate, logger.level = before


def test_names_are_below_sana() -> None:
    assert get_logger("sana.config").name == "sana.config"
    assert get_logger("scripts.inference").name == "sana.scripts.inference"


def test_calling_setup_again_prints_nothing_twice(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    setup_logging()
    setup_logging(file=tmp_path / "log.txt")
    get_logger("x").info("hello")
    assert capsys.readouterr().err.count("hello") == 1
    assert (tmp_path / "log.txt").read_text().count("hello") == 1


def test_other_processes_print_errors_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", "1")
    setup_logging(file=tmp_path / "log.txt")
    get_logger("x").info("hello")
    get_logger("x").error("broken")
    printed = capsys.readouterr().err
    assert "hello" not in printed
    assert "broken" in printed
    assert not (tmp_path / "log.txt").exists()
