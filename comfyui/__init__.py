"""Sana's nodes for ComfyUI: the tables that ComfyUI reads. The nodes are in `nodes_*.py`; no model code is here.

Link or copy this folder into ComfyUI's `custom_nodes` as `sana`; the package `sana` itself is installed with pip.
"""

try:
    import sana
except ModuleNotFoundError as error:
    raise ImportError(
        "Sana's nodes need the package sana in ComfyUI's Python: pip install -e FOLDER, the checkout they came from."
    ) from error

from .nodes_latent import EmptyDCAELatentImage, EmptySanaLatentImage, SanaResolutionSelect
from .nodes_load import ExtraVAELoader, GemmaLoader, SanaCheckpointLoader
from .nodes_sample import SanaSampler
from .nodes_text import GemmaTextEncode, SanaResolutionCond, SanaTextEncode

NODES = (
    SanaCheckpointLoader,
    GemmaLoader,
    ExtraVAELoader,
    SanaTextEncode,
    GemmaTextEncode,
    SanaResolutionSelect,
    SanaResolutionCond,
    EmptySanaLatentImage,
    EmptyDCAELatentImage,
    SanaSampler,
)
NODE_CLASS_MAPPINGS = {node.__name__: node for node in NODES}
NODE_DISPLAY_NAME_MAPPINGS = {node.__name__: node.TITLE for node in NODES}

__version__ = sana.__version__
__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
