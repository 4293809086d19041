"""Loggers below "sana", shown by the main process only. Progress bars and trackers are not here."""

import logging
import sys
from pathlib import Path

from sana.utils.distributed import is_main_process

ROOT = "sana"
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _MainProcessFilter(logging.Filter):
    """Lets records of the main process pass, and errors of every process."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or is_main_process()


def get_logger(name: str) -> logging.Logger:
    """Returns a logger below "sana"; it prints nothing until `setup_logging` or the application adds a handler."""
    return logging.getLogger(name if name == ROOT or name.startswith(f"{ROOT}.") else f"{ROOT}.{name}")


def setup_logging(level: int | str = logging.INFO, file: str | Path | None = None) -> logging.Logger:
    """Shows sana's log lines on standard error, and in `file` when given. Calling it again replaces the handlers.

    Args:
        level: lowest level shown.
        file: log file to append to; written by the main process only, its folder must exist.

    Returns:
        The "sana" logger.
    """
    logger = logging.getLogger(ROOT)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if file is not None and is_main_process():
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(FORMAT))
        handler.addFilter(_MainProcessFilter())
        logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    return logger
