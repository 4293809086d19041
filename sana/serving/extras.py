"""The third parties of the server, imported when it starts. Without them the error says which extra to install."""

import importlib
from typing import Any

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
RAY = "ray"


def need(module: str) -> Any:
    """Returns a module of the extras `serve` and `ray`.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        extra = RAY if package == RAY else "serve"
        raise ValueError(f"The server needs {package}: pip install 'sana-python[{extra}]'.") from error


def need_all() -> None:
    """Checks that everything the server needs is there, before a model is loaded.

    Raises:
        ValueError: something is not installed.
    """
    for package in PACKAGES:
        need(package)


def need_ray() -> Any:
    """Returns Ray, with everything that serving through it needs.

    Raises:
        ValueError: something is not installed.
    """
    need("ray.serve")  # imports `ray`, and what Ray needs for HTTP
    need_all()
    return need(RAY)
