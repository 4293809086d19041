"""Sana: text-to-image with linear diffusion transformers. Public names are imported on first use.

Nothing is built or loaded here, and importing this package imports neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sana.config import SanaConfig, load_config
    from sana.pipelines.sana_pipeline import SanaPipeline

__version__ = "0.1.0"
__all__ = ["SanaConfig", "SanaPipeline", "__version__", "load_config"]

_LAZY = {
    "SanaConfig": "sana.config",
    "SanaPipeline": "sana.pipelines.sana_pipeline",
    "load_config": "sana.config",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
