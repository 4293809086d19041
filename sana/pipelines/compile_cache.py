"""Compiled code kept in a folder, so that a new process compiles nothing again. What is compiled is not here.

Torch keeps compiled code below the system's temporary folder by default (`fx_graph_cache`), where it is lost with a
container. Here the same artifacts are one file a process, which is read before anything is compiled.
"""

import os
import secrets
from pathlib import Path

import torch

from sana.utils.logging import get_logger

logger = get_logger(__name__)

SUFFIX = ".torchcache"


class CompileCache:
    """The artifacts of `torch.compiler` in a folder.

    The files hold code that is run: use a folder that only you can write to.

    Args:
        folder: where they lie; made when first written to. None: nothing is read or written.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._own: Path | None = None  # what this process wrote last
        self._stored = 0

    def load(self) -> int:
        """Hands all files of this torch version to torch; returns how many it could use."""
        if self.folder is None or not self.folder.is_dir():
            return 0
        used = 0
        for file in sorted(self.folder.glob(f"{self._prefix}*{SUFFIX}")):
            if torch.compiler.load_cache_artifacts(file.read_bytes()) is None:
                logger.warning("%s is damaged and is not used; delete it.", file)
            else:
                used += 1
        return used

    def store(self) -> Path | None:
        """Writes what this process has compiled so far, if torch had to compile something since the last call.

        Returns:
            The file, which replaces the one of the last call; None where nothing was written.

        Raises:
            OSError: the folder cannot be written to.
        """
        compiled = _compiled()
        if self.folder is None or compiled == self._stored:
            return None
        artifacts = torch.compiler.save_cache_artifacts()
        self._stored = compiled
        if artifacts is None:  # a backend without a cache
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self._own or self.folder / f"{self._prefix}{secrets.token_hex(8)}{SUFFIX}"
        temporary = target.with_name(f".{secrets.token_hex(8)}.part")
        try:
            temporary.write_bytes(artifacts[0])
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        self._own = target
        return target

    @property
    def _prefix(self) -> str:
        return f"sana-torch{torch.__version__}-"


def _compiled() -> int:
    """Number of graphs that torch's compiler had to make, because no cache held them."""
    from torch._dynamo.utils import counters  # a second of imports, which only compiling needs

    return counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_bypass"]
